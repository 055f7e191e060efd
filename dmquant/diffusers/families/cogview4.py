"""CogView4: one list of transformer blocks with the same weights for image and text, on two streams to the end.

Between the blocks flow image tokens and text tokens. A block puts them together for attention, takes them apart again,
and runs its feed-forward on each. It also reads one vector of the timestep and three sizes (of the original image, of
the target, of the crop), from which its own `norm1` makes scales, shifts and gates. These norms are a tenth of all
weights, so they are not kept: their error stays within the block, and learned rounding of the block makes up for it.

Guidance takes a second call at every step, for the negative prompt. Texts are as long as the longest of a call, rounded
up to a multiple of 16, and no mask says which tokens are padding: text encoder and transformer see it like any other.
Calibration has them all of one length, so that calls for different prompts, or for none, compute together.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dmquant.diffusers.families import Family, blocks_in, joint_in


def _encoded(pipeline: Any, prompts: Sequence[str], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Embeddings (prompts, tokens, channels) of prompts and negative prompts, each encoded beside the longest."""
    import torch

    negative = arguments.get("negative_prompt") or ""
    negatives = [negative] * len(prompts) if isinstance(negative, str) else negative
    texts = list(dict.fromkeys([*prompts, *negatives]))
    lengths = map(len, pipeline.tokenizer(texts, verbose=False).input_ids)
    longest = max(zip(lengths, texts, strict=True))[1]
    settings = {name: arguments[name] for name in ("max_sequence_length",) if name in arguments}
    with torch.no_grad():
        embeddings = {
            text: pipeline.encode_prompt([text, longest], do_classifier_free_guidance=False, **settings)[0][0]
            for text in texts
        }
    both = {"prompt_embeds": prompts, "negative_prompt_embeds": negatives}
    return {name: torch.stack([embeddings[text] for text in each]) for name, each in both.items()}


FAMILY = Family(
    name="cogview4",
    component="transformer",
    backbones=("CogView4Transformer2DModel",),
    pipelines=("CogView4Pipeline",),
    keep={
        "patch_embed.*": "sees the noisy latents themselves, and every text token before the first block",
        "time_condition_embed.*": "one embedding of timestep and sizes conditions every block",
        "norm_out.*": "scales and shifts all tokens just before they become noise",
        "proj_out": "its error goes straight into the predicted noise",
    },
    blocks=blocks_in("transformer_blocks"),
    guidance="calls",
    joint=joint_in({"transformer_blocks": ("attn1.to_q attn1.to_k attn1.to_v",)}),
    encoded=_encoded,
)
