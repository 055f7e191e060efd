"""Flux.2, dev and klein: a list of joint blocks, then a list of blocks on both streams as one sequence.

Between the blocks flow image tokens and text tokens, as in Flux.1. Unlike there, no block makes scales, shifts and
gates of its own: three layers on top of the transformer make them from one vector of timestep and (dev) guidance scale,
one set for all joint blocks' images, one for their texts, one for all single blocks. An error in them is the same in
every block and adds up, so they are kept; they are 2 % of dev's weights and 4 % of klein's. A single block reads its
input by one layer, for queries, keys, values and a gated feed-forward, and writes by one, which meets attention's
output and the feed-forward's side by side.

dev's guidance is an input. klein is distilled to few steps without guidance; its base models are called a second time
at every step, without the prompt. Either way a call has one row an image.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dmquant.diffusers.families import Family, blocks_in, joint_in

if TYPE_CHECKING:
    from torch import nn


def _concatenations(transformer: "nn.Module") -> dict[str, int]:
    """No skips, but `to_out` of a single block reads attention's output and the feed-forward's, side by side."""
    return {
        f"single_transformer_blocks.{index}.attn.to_out": block.attn.inner_dim
        for index, block in enumerate(transformer.single_transformer_blocks)
    }


def _lengths(pipeline: Any, tokenizer: str, prompts: Sequence[str]) -> list[int]:
    """Tokens of each prompt in the conversation that the pipeline makes of it: dev's has a system message before."""
    written = pipeline.tokenizer.apply_chat_template
    if type(pipeline).__name__ == "Flux2Pipeline":
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        talks = format_input(list(prompts), pipeline.system_message)
        settings = {"padding": True, "verbose": False}
        tokens = written(talks, tokenize=True, return_dict=True, processor_kwargs=settings)
        return tokens["attention_mask"].sum(1).tolist()
    talks = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = [written(talk, tokenize=False, add_generation_prompt=True, enable_thinking=False) for talk in talks]
    return list(map(len, pipeline.tokenizer(texts, verbose=False).input_ids))


FAMILY = Family(
    name="flux2",
    component="transformer",
    backbones=("Flux2Transformer2DModel",),
    pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
    keep={
        "x_embedder": "sees the noisy latents themselves; 0.8 million of dev's 32 billion weights",
        "time_guidance_embed.*": "one embedding of timestep and guidance conditions every block",
        "context_embedder": "runs on every text token before the first block; all blocks read what it makes",
        "*_stream_modulation*.linear": "sets scale, shift and gate of all blocks of a kind: its error adds up",
        "norm_out.*": "scales and shifts all tokens just before they become noise",
        "proj_out": "its error goes straight into the predicted noise",
    },
    blocks=blocks_in("transformer_blocks", "single_transformer_blocks"),
    guidance="embedded",
    concatenations=_concatenations,
    joint=joint_in(
        {
            "transformer_blocks": (
                "attn.to_q attn.to_k attn.to_v",
                "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
            )
        }
    ),
    lengths=_lengths,
)
