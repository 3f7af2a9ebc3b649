"""The document of what is supported is the one that the tables of today give."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_document_of_models_is_generated_from_the_tables() -> None:
    environment = os.environ | {"PYTHONUTF8": "1"}
    command = [sys.executable, str(ROOT / "tools" / "models_doc.py")]
    generated = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert generated.returncode == 0, generated.stderr
    committed = (ROOT / "docs" / "models.md").read_text()
    assert committed == generated.stdout, "run: python tools/models_doc.py > docs/models.md"
