from __future__ import annotations

import random

import pytest
import torch
from reference_models.captions import COLOURS, TOKENS, WIDTH, CaptionError, Scene, Thing, embed, random_scene
from reference_models.latents import GAINS, to_blocks, to_wavelets
from reference_models.pictures import CHANNELS, SCALE, SHIFT, draw, to_latents, to_pictures
from reference_models.prompts import MOST, calibration_prompts, evaluation_prompts

RED_CIRCLE = Scene((Thing("large", "red", "circle", "top", "left"),), "plain", ("blue", "green"))
TWO = Scene((*RED_CIRCLE.things, Thing("small", "white", "ring", "bottom", "right")), "vertical", ("blue", "green"))


def test_a_caption_says_what_the_scene_holds():
    assert RED_CIRCLE.caption == "a large red circle top left on plain blue"
    assert TWO.caption == ("a large red circle top left and a small white ring bottom right on vertical blue to green")


def test_the_same_caption_is_the_same_conditioning_and_another_word_is_another():
    tokens, pooled = embed([TWO.caption, TWO.caption, TWO.caption.replace("red", "cyan"), ""])
    assert tokens.shape == (4, TOKENS, WIDTH)
    assert pooled.shape == (4, WIDTH)
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(pooled[0], pooled[1])
    assert (tokens[0] != tokens[2]).any(1).nonzero().flatten().tolist() == [1]  # the colour's slot
    assert not torch.equal(pooled[0], pooled[2])
    assert not tokens[3].any()
    assert not pooled[3].any()


def test_words_are_bound_to_their_thing():
    swapped = "a large red ring top left and a small white circle bottom right on vertical blue to green"
    tokens, pooled = embed([TWO.caption, swapped])
    assert (tokens[0] != tokens[1]).any(1).nonzero().flatten().tolist() == [2, 7]
    assert not torch.allclose(pooled[0], pooled[1])


def test_a_background_keeps_its_slot_with_one_thing_or_two():
    tokens, _ = embed(["a large red circle top left on vertical blue to green", TWO.caption])
    assert torch.equal(tokens[0, 10:], tokens[1, 10:])
    assert not tokens[0, 5:10].any()


@pytest.mark.parametrize("caption", ["a large red cat top left on plain blue", "red " * (TOKENS + 1)])
def test_what_was_never_learned_is_an_error_with_the_vocabulary(caption):
    with pytest.raises(CaptionError, match="expected at most 16 words of: small large"):
        embed([caption])


def test_pictures_come_back_from_latents():
    pictures = draw([RED_CIRCLE, TWO], 32)
    latents = to_latents(pictures)
    assert latents.shape == (2, CHANNELS, 16, 16)
    torch.testing.assert_close(to_pictures(latents), pictures, atol=1e-6, rtol=0)


def test_wavelets_are_the_same_latents_turned():
    latents = to_latents(draw([RED_CIRCLE, TWO], 32))
    wavelets = to_wavelets(latents)
    torch.testing.assert_close(to_blocks(wavelets), latents, atol=1e-5, rtol=0)
    grey = torch.ones(1, 4, 1, 1)
    assert to_wavelets(grey).flatten().tolist() == [2 * GAINS[0], 0, 0, 0]  # (1+1+1+1)/2
    checks = torch.tensor([1.0, -1.0, -1.0, 1.0]).view(1, 4, 1, 1)
    assert to_wavelets(checks).flatten().tolist() == [0, 0, 0, 2 * GAINS[3]]


def test_edges_are_where_the_brightness_changes():
    plain = Scene((Thing("small", "white", "ring", "bottom", "right"),), "plain", ("blue", "green"))
    edges = ((to_latents(draw([plain], 32)) - SHIFT) * SCALE)[0, 12:]
    assert edges[:, :8, :8].max() < -0.99  # plain blue: none
    assert edges[:, 10:14, 10:14].max() > 0.5  # the ring's outline


def test_a_drawing_shows_the_colours_where_the_caption_says():
    picture = draw([TWO], 32)[0]
    red, white = (torch.tensor(COLOURS[name]) for name in ("red", "white"))
    assert torch.allclose(picture[:, 8, 8], red)
    ring = picture[:, 24, 24 - 3]  # radius 0.26 · 0.75 of 16 pixels
    assert torch.allclose(ring, white, atol=0.05)
    assert picture[2, 0, 31] > picture[2, 31, 0]  # blue above green
    assert picture[1, 0, 31] < picture[1, 31, 0]


def test_jitter_moves_things_and_repeats_with_the_seed():
    one, again, other = (draw([TWO], 32, random.Random(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_random_scenes_have_distinct_colours_and_places():
    rng = random.Random(0)
    for scene in (random_scene(rng) for _ in range(200)):
        colours = [thing.colour for thing in scene.things]
        assert len({*colours, *scene.colours}) == len(colours) + 2
        assert len({(thing.row, thing.column) for thing in scene.things}) == len(scene.things)
        embed([scene.caption])


def test_no_method_is_judged_by_what_it_was_calibrated_with():
    judged = evaluation_prompts(MOST)
    for draw_number in (0, 1, 2):
        learned = calibration_prompts(64, draw_number)
        assert len(learned) == 64
        assert not {p.caption for p in learned} & {p.caption for p in judged}
        assert not {p.seed for p in learned} & {p.seed for p in judged}


def test_prompts_repeat_and_draws_are_independent():
    assert evaluation_prompts(8) == evaluation_prompts(32)[:8]
    assert calibration_prompts(8) == calibration_prompts(16)[:8]
    zero, one = calibration_prompts(64, 0), calibration_prompts(64, 1)
    assert not {p.seed for p in zero} & {p.seed for p in one}
    assert {p.caption for p in zero} != {p.caption for p in one}
    with pytest.raises(ValueError, match="expected 1 to 256"):
        evaluation_prompts(0)
