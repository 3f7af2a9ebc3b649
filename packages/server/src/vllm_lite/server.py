"""`python -m vllm_lite.server`: the command `vllm-lite serve`."""

import sys

from vllm_server.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("serve"))
