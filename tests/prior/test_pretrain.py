"""The toy prior's training, end to end at the smallest size, and what it leaves behind."""

import csv
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from diffusers import StableDiffusionPipeline

from moa_train.prior.load import load_prior
from moa_train.prior.pretrain.run import Pretraining, PretrainOptions, StageOptions
from moa_train.prior.pretrain.scenes import draw_scene_set
from moa_train.prior.pretrain.tokens import encode_captions, train_tokenizer
from moa_train.prior.probe import load_probe

# Lightning's advice on loaders and its own deprecations; diffusers' schedulers call numpy in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def options(folder: Path, steps: int = 2) -> PretrainOptions:
    stage = StageOptions(steps=steps, batch_size=4, learning_rate=1e-3)
    return PretrainOptions(
        out=folder / "prior", work=folder / "work", size=64, scenes=24, held_out_scenes=12, seed=0, workers=1,
        precision="32-true", accelerator="cpu", autoencoder=stage, kl_weight=1e-3, text_to_image=stage,
        drop_probability=0.1, ema_decay=0.9, image_encoder=stage, probe=stage, figure_samples=8, figure_steps=2,
        figure_guidance=2.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy_prior")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moa_train.prior.pretrain.run.RETRIEVAL_COUNT", 12)
        Pretraining(options(folder)).run(["autoencoder", "text_to_image", "image_encoder", "probe", "figures"])
    return folder / "prior"


def test_the_result_is_a_folder_that_diffusers_itself_loads_and_samples(trained):
    pipe = StableDiffusionPipeline.from_pretrained(
        trained, torch_dtype=torch.float32, safety_checker=None, local_files_only=True
    )
    picture = pipe("a photo of a man at the beach", num_inference_steps=2, output_type="np").images[0]
    assert picture.shape == (64, 64, 3)
    assert np.isfinite(picture).all()


def test_the_result_is_a_prior_with_its_own_image_encoder(trained):
    prior = load_prior(str(trained))
    assert prior.image_encoder.dim == 128
    assert prior.unet.config.sample_size == 16
    assert not any(p.requires_grad for part in (prior.unet, prior.vae, prior.text_encoder) for p in part.parameters())
    features = prior.image_encoder(torch.rand(1, 2, 3, 64, 64), torch.tensor([[True, False]]))
    assert features[0, 0].abs().sum() > 0
    assert features[0, 1].abs().sum() == 0


def test_weights_are_stored_in_half_precision(trained):
    from safetensors import safe_open

    for file in trained.rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            kinds = {tensors.get_tensor(name).dtype for name in tensors.keys()}  # noqa: SIM118 (not a dict)
        assert kinds <= {torch.float16, torch.int64}, file


def test_figures_and_learning_curves_lie_beside_the_weights(trained):
    figures = json.loads((trained / "figures.json").read_text())
    assert 5 < figures["vae_psnr_db"] < 60
    assert 0 <= figures["prior_context_accuracy"] <= 1
    assert figures["prior_samples"] == 8
    assert (trained / "samples.png").is_file()
    with (trained / "loss_text_to_image.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [1, 2]


def test_the_probe_knows_the_contexts_and_identities(trained):
    probe = load_probe(trained / "probe")
    assert len(probe.contexts) == 8
    assert probe.identity(torch.rand(1, 3, 64, 64)).shape == (1, 16)


def test_the_scale_makes_latents_of_unit_deviation(trained):
    prior = load_prior(str(trained))
    images = draw_scene_set("train", 24, 64, 0).images
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = prior.vae.encode(pixels).latent_dist.mean * prior.vae.config.scaling_factor
    assert abs(float(latents.std()) - 1.0) < 0.02


def test_a_run_that_was_cut_off_ends_with_the_same_weights(tmp_path):
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    Pretraining(options(straight, steps=4)).run(["autoencoder"])
    first = options(cut, steps=4)
    with pytest.MonkeyPatch.context() as patch:
        from moa_train.prior.pretrain.autoencoder import AutoencoderStage

        real = AutoencoderStage.loss

        def killed_at_step_two(self, rng):
            if self.global_step == 2:
                raise KeyboardInterrupt
            return real(self, rng)

        patch.setattr(AutoencoderStage, "loss", killed_at_step_two)
        patch.setattr("moa_train.prior.pretrain.stage.SAVE_EVERY", 2)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            Pretraining(first).run(["autoencoder"])
    Pretraining(first).run(["autoencoder"])
    ours, theirs = (
        (folder / "prior" / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() for folder in (cut, straight)
    )
    assert ours == theirs


def test_drawn_sets_do_not_depend_on_the_number_of_workers():
    one, two = draw_scene_set("validation", 6, 64, 3), draw_scene_set("validation", 6, 64, 3, workers=2)
    assert one.captions == two.captions
    np.testing.assert_array_equal(one.images, two.images)


def test_the_longest_detailed_caption_fits_the_context():
    scenes = draw_scene_set("train", 200, 64, 0)
    tokenizer = train_tokenizer([text for pair in scenes.captions for text in pair])
    longest = max(len(tokenizer(text).input_ids) for pair in scenes.captions for text in pair)
    assert longest <= tokenizer.model_max_length


def test_the_tokenizer_keeps_clips_conventions():
    scenes = draw_scene_set("train", 50, 64, 0)
    tokenizer = train_tokenizer([text for pair in scenes.captions for text in pair])
    assert tokenizer.eos_token_id == len(tokenizer) - 1, "open_clip pools at the highest id"
    ids = encode_captions(tokenizer, ["a photo of a MAN at the beach", "été ☂ unknown"])
    assert ids.shape == (2, 64)
    assert ids[0, 0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "a photo of a man at the beach"
    assert tokenizer.unk_token_id not in ids[1, 1:4].tolist()


def test_an_unknown_stage_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="stages holds vea; expected some of autoencoder"):
        Pretraining(options(tmp_path)).run(["vea"])


def test_the_small_clip_is_a_plain_open_clip_folder(trained):
    model = open_clip.create_model(f"local-dir:{trained / 'image_encoder'}")
    assert model.visual.output_dim == 128
