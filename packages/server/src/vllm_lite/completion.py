"""`python -m vllm_lite.completion`: the command `vllm-lite completion`."""

import sys

from vllm_server.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("completion"))
