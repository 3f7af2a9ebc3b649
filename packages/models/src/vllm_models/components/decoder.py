"""What the runner needs of an architecture, and the frame that most of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn

from vllm_models.components.context import ForwardContext, LayerKV
from vllm_models.components.embedding import Embedding
from vllm_models.components.linear import Linear
from vllm_models.components.norm import RMSNorm
from vllm_models.components.rotary import RotaryEmbedding, Rotation
from vllm_models.config import ModelConfig
from vllm_models.weights.saved import SavedTensor

MakeBlock = Callable[[ModelConfig, int], nn.Module]
MakeStack = Callable[[ModelConfig, MakeBlock], "DecoderStack"]


class Decoder(nn.Module, ABC):
    """A causal language model whose parameters are named as in its checkpoint."""

    @abstractmethod
    def __init__(self, config: ModelConfig) -> None:
        """Build empty layers; the loader fills them."""
        super().__init__()

    @classmethod
    def split(cls, saved: SavedTensor, config: ModelConfig) -> Iterable[SavedTensor]:
        """The tensors of this model that a saved one holds, such as the experts of a stack.

        Nothing, for a tensor that this model has no use for.
        """
        return (saved,)

    @classmethod
    def kv_layers(cls, config: ModelConfig) -> Sequence[LayerKV]:
        """What each layer keeps of a position; usually all keep the same."""
        c = config
        return tuple(LayerKV(w, c.num_kv_heads, c.head_dim, c.head_dim) for w in c.windows)

    @abstractmethod
    def forward(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """Final hidden states of a step: [T] -> [T, M]."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the whole vocabulary after some hidden states: [N, M] -> [N, V], in float32 or
        the type of the hidden states; valid until the next call."""


class DecoderStack(nn.Module):
    """Embedding, layers and last norm: what a checkpoint calls `model`.

    Args:
        c: Shape of the model.
        block: Makes the layer of an index. It is called with `(x, added, rotate, ctx)` and returns
            x and added of the next layer: the stream `[T, M]`, and what the first norm of a layer
            adds to it, if anything.
    """

    def __init__(self, c: ModelConfig, block: MakeBlock) -> None:
        super().__init__()
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(block(c, layer) for layer in range(c.num_layers))
        self.norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.rotary_emb = RotaryEmbedding(c.head_dim, c.rope)
        differs = c.local_rope != c.rope
        self.local_rotary_emb = RotaryEmbedding(c.head_dim, c.local_rope) if differs else None
        self.windows = c.windows

    def forward(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """[T] -> [T, M]."""
        x = self.embed_tokens(token_ids)
        near = far = self.rotary_emb(ctx.positions, x.dtype)
        if self.local_rotary_emb is not None:
            near = self.local_rotary_emb(ctx.positions, x.dtype)
        return self.run_layers(x, near, far, ctx)

    def run_layers(self, x: Tensor, near: Rotation, far: Rotation, ctx: ForwardContext) -> Tensor:
        """Layers with a window turn as `near` says: embeddings [T, M] -> hidden states [T, M]."""
        added = None
        for layer, window in zip(self.layers, self.windows, strict=True):
            x, added = layer(x, added, near if window else far, ctx)
        return self.norm.after(x, added)[1]


class CausalLM(Decoder):
    """A stack of one kind of block with an output head, which may be the embedding table.

    Args:
        config: Shape of the model.
        block: Makes the layer of an index.
        stack: Makes what is called `model` of such layers.
    """

    def __init__(
        self, config: ModelConfig, block: MakeBlock, stack: MakeStack = DecoderStack
    ) -> None:
        super().__init__(config)
        self.model = stack(config, block)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size)

    def forward(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """[T] -> [T, M]."""
        return self.model(token_ids, ctx)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, M] -> [N, V]."""
        if self.lm_head is None:
            return self.model.embed_tokens.logits(hidden)
        return self.lm_head.scores(hidden)


def text_part(saved: SavedTensor) -> SavedTensor | None:
    """A tensor of a multimodal checkpoint under the name it has in a text model; None if it
    belongs to another modality."""
    name = saved.name
    for prefix in ("language_model.", "model.language_model."):
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            is_whole = rest.startswith(("model.", "lm_head."))
            return saved._replace(name=rest if is_whole else f"model.{rest}")
    parts = name.removeprefix("model.").partition(".")
    others = ("vision_tower", "multi_modal_projector", "audio_tower", "embed_vision", "embed_audio")
    return None if parts[0] in others else saved
