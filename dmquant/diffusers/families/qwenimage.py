"""Qwen-Image: one list of joint transformer blocks, which run image and text side by side to the end.

Between the blocks flow two streams, text tokens and image tokens, which meet in every block's attention. Every block
also reads one vector of the timestep, from which its own `img_mod` and `txt_mod` make scales, shifts and gates. These
are a third of all weights, so they are not kept: their error stays within the block, and learned rounding of the block
makes up for it. Guidance takes a second call at every step, for the negative prompt, without which there is none; its
scale is called `true_cfg_scale`, as `guidance_scale` is for models that are distilled, of which there are none.
"""

from collections.abc import Sequence
from typing import Any

from dmquant.diffusers.families import Family, blocks_in, imaged, joint_in


def _lengths(pipeline: Any, tokenizer: str, prompts: Sequence[str]) -> list[int]:
    """Tokens of each prompt in its template, without those before it, which the pipeline drops."""
    texts = [pipeline.prompt_template_encode.format(prompt) for prompt in prompts]
    before = pipeline.prompt_template_encode_start_idx
    return [len(ids) - before for ids in pipeline.tokenizer(texts, verbose=False).input_ids]


FAMILY = Family(
    name="qwenimage",
    component="transformer",
    backbones=("QwenImageTransformer2DModel",),
    pipelines=("QwenImagePipeline",),
    imaged=imaged("QwenImagePipeline", "Img2Img", "Inpaint", "ControlNet"),
    edits=("QwenImageEditPipeline", "QwenImageEditPlusPipeline"),
    keep={
        "img_in": "sees the noisy latents themselves; 0.2 million of Qwen-Image's 20 billion weights",
        "txt_in": "runs on every text token before the first block; all blocks read what it makes",
        "time_text_embed.*": "one embedding of the timestep conditions every block",
        "norm_out.*": "scales and shifts all tokens just before they become noise",
        "proj_out": "its error goes straight into the predicted noise",
    },
    blocks=blocks_in("transformer_blocks"),
    guidance="calls",
    guidance_argument="true_cfg_scale",
    joint=joint_in(
        {
            "transformer_blocks": (
                "attn.to_q attn.to_k attn.to_v",
                "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
            )
        }
    ),
    padded={"encoder_hidden_states": "encoder_hidden_states_mask"},
    listed=("img_shapes",),
    lengths=_lengths,
)
