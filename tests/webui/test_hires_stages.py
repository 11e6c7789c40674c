"""The hires pass in stages: cascades, relay and mixing, with every upscaler and sampler family."""

from __future__ import annotations

import pytest

from .client import distance, is_alive, same

SMALL = {"width": 64, "height": 64}
MIXING = {"iterative_mixing": {"alpha": 1.0}}
FAMILIES = (
    *("Euler", "Euler a", "Heun", "DPM++ 2M", "DPM++ 2M SDE", "DPM++ SDE", "DPM++ 3M SDE", "LCM", "Restart"),
    *("DDIM", "PLMS", "UniPC"),
)


def sizes(answer):
    return [picture.shape[1::-1] for picture in answer.pictures]


@pytest.mark.parametrize("upscaler", ["Latent", "Latent (bicubic antialiased)", "Lanczos"])
@pytest.mark.parametrize("scale", [2, 4])
def test_a_cascade_reaches_the_size_that_was_asked_for(webui, unharmed, upscaler, scale):
    request = SMALL | {"hr_scale": scale, "hr_upscaler": upscaler}
    plain, staged = webui.hires(**request), webui.hires({"cascade": {"largest": 1.5}}, **request)
    assert staged.acted("cascade")
    assert sizes(staged) == sizes(plain) == [(64 * scale, 64 * scale)]
    assert is_alive(staged.picture) and distance(staged.picture, plain.picture) > 0.1
    assert same(webui.hires(**request).picture, plain.picture)
    unharmed()


def test_one_stage_is_the_hosts_own_pass(webui):
    request = SMALL | {"hr_scale": 2}
    answer = webui.hires({"cascade": True}, **request)
    assert same(answer.picture, webui.hires(**request).picture)
    assert "one stage" in answer.note and not answer.acted("cascade")


def test_stages_listed_not_square_and_not_whole(webui):
    answer = webui.hires({"cascade": {"factors": "1.5, 1.3"}}, width=64, height=96, hr_scale=1.5)
    assert sizes(answer) == [(128, 184)]


def test_values_of_each_stage(webui, faults):
    """Evaluations are counted: two in the first pass, then what each stage was told."""
    webui.hires({"cascade": {"steps": "3, 1"}}, **SMALL, hr_scale=4, fault=("count", 0))
    assert len(webui.residue()["rows"]) == 2 + 3 + 1


def test_a_clean_up_changes_the_picture_and_keeps_its_size(webui):
    request = SMALL | {"hr_scale": 2}
    plain, cleaned = webui.hires(**request), webui.hires({"cascade": {"cleanup": 0.2}}, **request)
    assert cleaned.acted("cascade") and sizes(cleaned) == sizes(plain)
    assert not same(cleaned.picture, plain.picture)


def test_batches(webui):
    # upscaled latents: the encoding of pictures takes random numbers that depend on batch mates
    request = SMALL | {"hr_scale": 4, "hr_upscaler": "Latent"}
    block = {"cascade": True, **MIXING}
    batch = webui.hires(block, **request, batch_size=2, seed=20)
    assert len(batch.pictures) == 2
    for k, picture in enumerate(batch.pictures):
        assert distance(picture, webui.hires(block, **request, seed=20 + k).picture) < 0.5


def test_img2img_in_stages(webui):
    request = {"width": 256, "height": 256, "steps": 2}
    webui.img2img(**request)  # Forge's first picture of a size differs from its later ones in the last bits
    plain, staged = webui.img2img(**request), webui.img2img({"cascade": {"largest": 1.5}}, **request)
    assert staged.acted("cascade") and sizes(staged) == [(256, 256)]
    assert is_alive(staged.picture) and distance(staged.picture, plain.picture) > 0.1
    assert same(webui.img2img(**request).picture, plain.picture)


def test_inpainting_has_one_size(webui):
    request = {"width": 192, "height": 256}
    webui.inpaint(**request)  # as above
    answer = webui.inpaint({"cascade": {"largest": 1.5}}, **request)
    assert same(answer.picture, webui.inpaint(**request).picture)
    assert "mask" in answer.note


@pytest.mark.parametrize("upscaler", ["Latent", "Lanczos"])
def test_a_relay_does_fewer_evaluations(webui, faults, upscaler):
    request = SMALL | {"hr_scale": 2, "steps": 8, "hr_second_pass_steps": 0, "hr_upscaler": upscaler}
    webui.hires(**request, fault=("count", 0))
    before = len(webui.residue()["rows"])
    answer = webui.hires({"relay": {"share": 0.5, "matched": False}}, **request, fault=("count", 0))
    assert answer.acted("relay") and is_alive(answer.picture)
    assert len(webui.residue()["rows"]) < before


@pytest.mark.parametrize("sampler", FAMILIES)
def test_every_sampler_family(webui, unharmed, sampler):
    if sampler not in webui.samplers:
        pytest.skip(f"this host has no {sampler}")
    request = SMALL | {"hr_scale": 2, "sampler_name": sampler, "steps": 4, "hr_second_pass_steps": 4}
    plain = webui.hires(**request)
    staged = webui.hires({"cascade": {"largest": 1.5}, **MIXING, "low_band_lock": True}, **request)
    assert staged.acted("cascade", "iterative_mixing", "low_band_lock"), staged.note
    assert is_alive(staged.picture) and distance(staged.picture, plain.picture) > 0.1
    relayed = webui.hires({"relay": {"share": 0.5}}, **request)
    assert relayed.acted("relay") and is_alive(relayed.picture)
    unharmed()


@pytest.mark.parametrize("kind", ["interrupt", "skip"])
def test_an_interrupt_in_the_second_stage_keeps_the_first(webui, faults, unharmed, kind):
    request = SMALL | {"hr_scale": 4, "hr_upscaler": "Lanczos", "hr_second_pass_steps": 3}
    answer = webui.hires({"cascade": True}, **request, fault=(kind, 7))  # 2 + 3 calls, then the second stage
    assert answer.status == 200
    assert sizes(answer) == [(128, 128)]
    unharmed()


def test_a_fault_in_the_second_stage(webui, faults, unharmed):
    request = SMALL | {"hr_scale": 4, "hr_second_pass_steps": 3}
    plain = webui.hires(**request)
    block = {"cascade": {"denoise": "0.5, 0.4", "cfg_scale": "9"}, **MIXING}
    assert webui.hires(block, **request, fault=("raise", 7)).status == 500
    assert same(webui.hires(**request).picture, plain.picture)
    unharmed()


def test_the_infotext_gives_the_same_picture_again(webui):
    # A1111's API does not understand the words that its own infotext reader puts there for "as the first pass"
    request = SMALL | {"hr_scale": 4, "hr_sampler_name": "Euler", "hr_scheduler": "Normal", "hr_checkpoint_name": None}
    first = webui.hires({"cascade": {"denoise": "0.6, 0.4", "cleanup": 0.1}, **MIXING}, **request)
    again = webui.hires(**request, infotext=first.infotext)
    assert same(again.picture, first.picture)


@pytest.mark.parametrize(
    ("label", "values"),
    [("[Hires Plus] Iterative mixing Alpha", "0.5, 3"), ("[Hires Plus] Cascade Stages", '"2, 2", "1.5"')],
)
def test_axes(webui, label, values):
    request = SMALL | {"hr_scale": 2, "hr_second_pass_steps": 3}
    plain = webui.hires(**request)
    axis = webui.axis(label)
    script = [axis, values, [], 0, "", [], 0, "", [], False, True, False, False, False, False, False, 0, True]
    answer = webui.hires({"cascade": True, **MIXING}, **request, script_name="x/y/z plot", script_args=script)
    assert answer.status == 200, answer.body
    assert same(webui.hires(**request).picture, plain.picture)


def test_weight_zero_is_the_hosts_pass(webui):
    request = SMALL | {"hr_scale": 2}
    answer = webui.hires({"iterative_mixing": {"maximum": 0.0}}, **request)
    assert same(answer.picture, webui.hires(**request).picture)
