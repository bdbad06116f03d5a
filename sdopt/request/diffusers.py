"""What users of diffusers type, and what to type here: keywords of a call, and attributes of a pipeline.

The page `sdopt/README.md` has the same as a table.
"""

from __future__ import annotations

_ADD_ADAPTER = "add one to the bundle, sdopt export IP_ADAPTER --onto BUNDLE --name face, and give ip_adapter_image="
_NO_CALLBACK = "use callback_on_step_end(pipe, index, timestep, tensors), or iterate over pipe.denoise(...)"
_NO_CHECKER = "sdopt has no safety checker; leave it out, and check result.images yourself"
_EXPORTED = "the bundle decides it; export a checkpoint that has another one: sdopt export"
_HIRES = "use hires=2.0, with hires_strength= and hires_steps="
_LOADED = "sdopt.load decides it: sdopt.load(path, backend=..., precision=...)"
_NO_SKIP = "sdopt calls the whole transformer; leave it out, and guide with guidance_scale and guidance_interval"
_SAMPLER = 'use sampler= and schedule=, e.g. pipe(prompt, sampler="euler", schedule="karras")'
_SCALE = "sdopt has no attention processors; use lora_scale=0.8, or pipe.set_adapters(name, 0.8)"

INSTEAD = {
    "generator": "use seed=, one number or one for each image, e.g. seed=[1, 2]; rng= says whose noise it is",
    "num_images": "use num_images_per_prompt=",
    "steps": "use num_inference_steps=",
    "cfg_scale": "use guidance_scale=",
    "scheduler": _SAMPLER,
    "return_dict": "the answer is always a Result; leave it out, and take result.images",
    "cross_attention_kwargs": _SCALE,
    "joint_attention_kwargs": _SCALE,
    "callback": _NO_CALLBACK,
    "callback_steps": _NO_CALLBACK,
    "callback_on_step_end_tensor_inputs": "callback_on_step_end gets latents alone; leave it out",
    "masked_image_latents": "give image= and mask_image=; the masked picture is made of them",
    "enable_hr": _HIRES,
    "hr_scale": _HIRES,
    "hr_upscaler": 'hires= enlarges latents, as the upscaler "Latent" does; leave it out',
    "hr_second_pass_steps": "use hires_steps=",
    "denoising_strength": "use strength=, or with hires= hires_strength=",
    "skip_guidance_layers": _NO_SKIP,
    "skip_layer_guidance_scale": _NO_SKIP,
    "skip_layer_guidance_start": _NO_SKIP,
    "skip_layer_guidance_stop": _NO_SKIP,
    "safety_checker": _NO_CHECKER,
    "requires_safety_checker": _NO_CHECKER,
    "safety_concept": _NO_CHECKER,
    "sld_guidance_scale": _NO_CHECKER,
    "max_embeddings_multiples": 'use prompt_style="a1111", which reads prompts of any length',
    "device": _LOADED,
    "torch_dtype": _LOADED,
    "dtype": _LOADED,
}

_CALL = "give it to each call"
ATTRIBUTES = {
    **INSTEAD,
    "controlnet": "add one to the bundle, sdopt export CONTROLNET --onto BUNDLE --name canny, and give control_image=",
    "unet": _EXPORTED,
    "transformer": _EXPORTED,
    "text_encoder_3": _EXPORTED,
    "tokenizer_3": _EXPORTED,
    "vae": 'add a tiny one to the bundle, sdopt export TAESD --onto BUNDLE --name tiny, and give vae="tiny"',
    "text_encoder": _EXPORTED,
    "text_encoder_2": _EXPORTED,
    "tokenizer": _EXPORTED,
    "tokenizer_2": _EXPORTED,
    "feature_extractor": _NO_CHECKER,
    "image_encoder": _ADD_ADAPTER,
    "_interrupt": "to cancel, iterate over pipe.denoise(...) and stop: for step in pipe.denoise(prompt): ... break",
    "_guidance_scale": f"{_CALL}: guidance_scale=7.5, or one scale for each step: guidance_scale=[7.5, 7.5, 1.0]",
    "_guidance_rescale": f"{_CALL}: guidance_rescale=0.7",
    "_clip_skip": f"{_CALL}: clip_skip=1",
    "_denoising_end": f"{_CALL}: denoising_end=0.8",
    "_denoising_start": f"{_CALL}: denoising_start=0.8",
    "_num_timesteps": f"{_CALL}: num_inference_steps=20",
    "_cross_attention_kwargs": INSTEAD["cross_attention_kwargs"],
    "_progress_bar_config": "use pipe.set_progress_bar_config(disable=False), or progress=True in a call",
}
