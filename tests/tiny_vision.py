"""Tiny random vision-language models and their processors; nothing is downloaded, torchvision is not needed."""

from __future__ import annotations

import numpy
import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tether.types import Example, ImageInputs
from tiny import _SHAPE, tiny_tokenizer

MARKS = ["<image>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
PARTS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VISION = ["llava", "qwen2_vl"]


class QwenProcessor(transformers.Qwen2VLProcessor):
    """Qwen2-VL's processor without its video part, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def tiny_processor(family: str) -> ProcessorMixin:
    """LLaVA-like: 16 tokens for every image. Qwen2-VL-like: one token for 8 × 8 pixels, images differ in size."""
    tokenizer = tiny_tokenizer(chat=False)
    tokenizer.add_tokens(MARKS, special_tokens=True)
    if family == "llava":
        images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        return transformers.LlavaProcessor(
            images,
            tokenizer,
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=PARTS.replace("IMAGE", "<image>"),
        )
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=64 * 16)
    template = PARTS.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    return QwenProcessor(images, tokenizer, chat_template=template)


def tiny_vision(family: str, *, seed: int = 0, attention: str = "sdpa", **changes: object) -> PreTrainedModel:
    """A float32 model for the ids of `tiny_processor(family)`, with weights large enough that images show."""
    processor = tiny_processor(family)
    names = {mark: processor.tokenizer.convert_tokens_to_ids(mark) for mark in MARKS}
    text = {**_SHAPE, "vocab_size": len(processor.tokenizer), **changes}
    if family == "llava":
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**vision, image_size=16, patch_size=4),
            text_config=transformers.LlamaConfig(**text),
            image_token_id=names["<image>"],
            vision_feature_select_strategy="default",
        )
    else:
        vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
        config = transformers.Qwen2VLConfig(
            vision_config={**vision, "spatial_merge_size": 2, "temporal_patch_size": 2},
            text_config={**text, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
            image_token_id=names["<|image_pad|>"],
            video_token_id=names["<|video_pad|>"],
            vision_start_token_id=names["<|vision_start|>"],
            vision_end_token_id=names["<|vision_end|>"],
        )
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
    return model


class LlavaForSequenceClassification(GenericForSequenceClassification, transformers.LlavaPreTrainedModel):
    """A reward model over images as transformers would write it; it has none for this family."""


class Qwen2VLForSequenceClassification(GenericForSequenceClassification, transformers.Qwen2VLPreTrainedModel):
    """The same."""


def tiny_vision_reward(family: str, *, seed: int = 0) -> PreTrainedModel:
    """A reward model for the ids of `tiny_processor(family)`."""
    config = tiny_vision(family).config
    config.num_labels = 1
    classes = {"llava": LlavaForSequenceClassification, "qwen2_vl": Qwen2VLForSequenceClassification}
    torch.manual_seed(seed)
    model = classes[family](config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
    return model


def picture(seed: int, width: int = 16, height: int = 16) -> Image.Image:
    """An image of random pixels."""
    pixels = numpy.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=numpy.uint8)
    return Image.fromarray(pixels)


def vision_examples(family: str, *, completions: int = 2) -> list[Example]:
    """Prompts with one image, two, and none, of uneven sizes; made by the processor itself."""
    processor = tiny_processor(family)
    mark = "<image>" if family == "llava" else "<|vision_start|><|image_pad|><|vision_end|>"
    prompts = [
        (f"<s>{mark} was it good", [picture(1)]),
        (f"<s>the film {mark} or {mark} this", [picture(2, 24, 16), picture(3, 16, 32)]),
        ("<s>no picture at all", []),
        (f"{mark}", [picture(4, 32, 16)]),
    ]
    generator = torch.Generator().manual_seed(0)
    examples = []
    for text, images in prompts:
        made = processor(text=[text], images=[images] if images else None, return_tensors="pt")
        ids = made.pop("input_ids")[0]
        del made["attention_mask"]
        types = (ids == processor.image_token_id).long()
        names = tuple(name for name in ("mm_token_type_ids",) if made.pop(name, None) is not None)
        inputs = ImageInputs(dict(made), types, names) if images else None
        answers = [
            torch.randint(4, 250, (int(torch.randint(1, 9, (), generator=generator)),), generator=generator).tolist()
            for _ in range(completions)
        ]
        examples.append(Example.of(ids.tolist(), answers, images=inputs))
    return examples
