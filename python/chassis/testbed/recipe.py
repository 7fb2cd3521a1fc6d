"""What the testbed is made of: three models, their sizes and their schedules. Changing a figure makes a new cache entry."""

from dataclasses import asdict, dataclass

from transformers import LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

MODELS = ("base", "expert", "other_expert")


@dataclass(frozen=True)
class Recipe:
    """Vocabulary sizes in tokens, widths in dimensions, a batch of `batch` windows of `length` tokens, seeds fixed."""

    base_vocabulary: int = 2048
    base_width: int = 128
    base_layers: int = 3
    base_steps: int = 600
    base_rate: float = 3e-3
    expert_steps: int = 250
    expert_rate: float = 1e-3
    other_vocabulary: int = 3072
    other_width: int = 192
    other_layers: int = 4
    other_steps: int = 450
    other_rate: float = 3e-3
    batch: int = 16
    length: int = 128
    evaluation_characters: int = 3_000
    version: int = 1

    def as_dict(self) -> dict[str, int | float]:
        return asdict(self)


RECIPES = {
    "small": Recipe(),
    "tiny": Recipe(
        base_vocabulary=512,
        base_width=32,
        base_layers=2,
        base_steps=30,
        expert_steps=15,
        other_vocabulary=640,
        other_width=48,
        other_layers=2,
        other_steps=30,
        batch=8,
        length=64,
        evaluation_characters=600,
    ),
}


def base_config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Llama with an unembedding of its own."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.base_width,
        intermediate_size=_feed_forward(recipe.base_width),
        num_hidden_layers=recipe.base_layers,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )


def other_config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """Qwen3 with the unembedding tied to the input embedding."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.other_width,
        intermediate_size=_feed_forward(recipe.other_width),
        num_hidden_layers=recipe.other_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=recipe.other_width // 4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )


def _feed_forward(width: int) -> int:
    return width * 8 // 3 // 16 * 16
