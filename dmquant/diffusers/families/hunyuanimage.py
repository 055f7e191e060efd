"""HunyuanImage 2.1: a list of joint blocks, then a list of single ones, as Flux.1 has, but on two streams to the end.

Between the blocks flow image tokens and text tokens; a single block puts them together, and takes them apart again.
Every block also reads one vector of the timestep, from which its own norms make scales, shifts and gates. Those norms
are a quarter of all weights, so they are not kept: their error stays within the block. Before the blocks a small
transformer refines the text, and a second embedder reads what is quoted in the prompt, to be written into the image.
Guidance is an object of the pipeline's, not an argument: it takes a second call at every step, where it is on.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dmquant.diffusers.families import Family, blocks_in, joint_in

if TYPE_CHECKING:
    from torch import nn


def _concatenations(transformer: "nn.Module") -> dict[str, int]:
    """No skips, but `proj_out` of a single block reads attention's output and the MLP's, side by side."""
    return {
        f"single_transformer_blocks.{index}.proj_out": block.proj_out.out_features
        for index, block in enumerate(transformer.single_transformer_blocks)
    }


def _lengths(pipeline: Any, tokenizer: str, prompts: Sequence[str]) -> list[int]:
    """Tokens of each prompt in its template, without those before it, or for ByT5 of what is quoted in it."""
    from diffusers.pipelines.hunyuan_image.pipeline_hunyuanimage import extract_glyph_text

    if tokenizer == "tokenizer_2":
        quoted = [extract_glyph_text(prompt) for prompt in prompts]
        return [0 if text is None else len(pipeline.tokenizer_2(text, verbose=False).input_ids) for text in quoted]
    texts = [pipeline.prompt_template_encode.format(prompt) for prompt in prompts]
    before = pipeline.prompt_template_encode_start_idx
    return [len(ids) - before for ids in pipeline.tokenizer(texts, verbose=False).input_ids]


FAMILY = Family(
    name="hunyuanimage",
    component="transformer",
    backbones=("HunyuanImageTransformer2DModel",),
    pipelines=("HunyuanImagePipeline",),
    keep={
        "x_embedder.*": "sees the noisy latents themselves; 0.2 million of HunyuanImage's 17 billion weights",
        "context_embedder.*": "runs on every text token before the first block; all blocks read what it makes",
        "context_embedder_2.*": "reads the text to be written into the image, letter by letter",
        "time_guidance_embed.*": "one embedding of timestep and guidance conditions every block",
        "norm_out.*": "scales and shifts all tokens just before they become noise",
        "proj_out": "its error goes straight into the predicted noise",
    },
    blocks=blocks_in("transformer_blocks", "single_transformer_blocks"),
    guidance="calls",
    concatenations=_concatenations,
    joint=joint_in(
        {
            "transformer_blocks": (
                "attn.to_q attn.to_k attn.to_v",
                "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
            ),
            "single_transformer_blocks": ("attn.to_q attn.to_k attn.to_v proj_mlp",),
        }
    ),
    token_limits={"tokenizer": 1000, "tokenizer_2": 128},
    lengths=_lengths,
)
