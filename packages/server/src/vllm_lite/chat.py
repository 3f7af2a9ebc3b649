"""`python -m vllm_lite.chat`: the command `vllm-lite chat`."""

import sys

from vllm_server.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("chat"))
