"""`python -m vllm_server.config`: the reference, the example and the JSON Schema."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from vllm_server.config.document import example, json_schema, markdown


def main(argv: Sequence[str]) -> int:
    """Write one of the files to standard output."""
    match argv:
        case ["--markdown"]:
            sys.stdout.write(markdown())
        case ["--example"]:
            sys.stdout.write(example())
        case ["--json-schema"]:
            print(json.dumps(json_schema(), indent=2))
        case _:
            print("usage: python -m vllm_server.config --markdown | --example | --json-schema")
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
