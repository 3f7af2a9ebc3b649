"""`python -m vllm_server.config --markdown | --json-schema`: what is derived from the schema."""

from __future__ import annotations

import json
import sys

from vllm_server.config.document import json_schema, markdown

if __name__ == "__main__":
    if sys.argv[1:] == ["--markdown"]:
        sys.stdout.write(markdown())
    elif sys.argv[1:] == ["--json-schema"]:
        print(json.dumps(json_schema(), indent=2))
    else:
        sys.exit("usage: python -m vllm_server.config --markdown | --json-schema")
