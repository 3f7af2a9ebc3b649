"""Text: tokenizers, chat templates, and the pieces that turn tokens into an answer."""

from vllm_server.text.chat_template import ChatTemplate
from vllm_server.text.detokenize import Detokenizer
from vllm_server.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Detokenizer", "Tokenizer"]
