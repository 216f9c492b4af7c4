"""Scenes, their images and annotations."""

import numpy as np
import pytest

from modeling_llava.data_engine.contexts import ContextCounts, read_contexts
from modeling_llava.tiny_world.drawing import PAINT, draw_image, draw_place
from modeling_llava.tiny_world.scenes import CATEGORIES, COLOURS, HELD_OUT, Scene, Thing, box_of, write_captions
from modeling_llava.tiny_world.world import draw_scenes, write_split


def pairs_of(scene):
    return [(thing.colour, thing.category) for thing in scene.things]


def test_held_out_pairs_are_in_held_out_scenes_alone_and_both_halves_of_each_are_common():
    pairs = [pair for scene in draw_scenes(2000, 0, "train") for pair in pairs_of(scene)]
    for colour, category in HELD_OUT:
        assert sum(pair[0] == colour for pair in pairs) > 200
        assert sum(pair[1] == category for pair in pairs) > 200
    assert set(pairs) == {(colour, category) for colour in COLOURS for category in CATEGORIES} - HELD_OUT
    for scene in draw_scenes(200, 0, "held_out", held_out=True):
        assert len(HELD_OUT & set(pairs_of(scene))) == 1


def test_within_a_scene_every_question_has_one_answer_and_boxes_are_in_their_cells():
    for scene in draw_scenes(500, 2, "train"):
        things = scene.things
        assert len({t.category for t in things}) == len({t.colour for t in things}) == len(things)
        assert len({(t.row, t.column) for t in things}) == len(things)
        assert sum(t.size == "large" for t in things) <= 1
        for thing in things:
            x, y, width, height = box_of(thing, 160, 160)
            assert 0 <= x and 0 <= y and x + width <= 160 and y + height <= 160
            assert thing.column == ("left", "middle", "right")[int((x + width / 2) // (160 / 3))]
            assert thing.row == ("top" if y + height / 2 < 80 else "bottom")


def test_the_same_seed_gives_the_same_world_and_splits_differ():
    train, unseen = draw_scenes(500, 3, "train"), draw_scenes(100, 3, "unseen")
    assert train == draw_scenes(500, 3, "train") != draw_scenes(500, 4, "train")
    assert not {scene.seed for scene in train} & {scene.seed for scene in unseen}


def test_captions_name_every_thing_and_the_place_and_nothing_that_boxes_are_for():
    for scene in draw_scenes(50, 5, "train"):
        captions = write_captions(scene)
        assert len(set(captions)) == 3
        for caption in captions:
            assert all(thing.name in caption for thing in scene.things)
            assert not {"large", "small", "left", "right", "top", "two", "three"} & set(caption.split())


def test_an_image_is_reproducible_and_changes_only_where_the_boxes_and_their_shadows_are():
    for scene in draw_scenes(20, 6, "train"):
        image = np.asarray(draw_image(scene)).astype(int)
        assert np.array_equal(image, np.asarray(draw_image(scene)))
        empty = np.asarray(draw_place(scene.place, np.random.default_rng(scene.seed))).astype(int)
        changed = np.abs(image - empty).max(axis=-1) > 40
        allowed = np.zeros_like(changed)
        for thing in scene.things:
            x, y, width, height = box_of(thing, 160, 160)
            margin = 0.2 * width
            rows = slice(max(0, int(y - margin)), int(y + height + margin))
            columns = slice(max(0, int(x - margin)), int(x + width + margin))
            allowed[rows, columns] = True
            assert changed[rows, columns].mean() > 0.15, f"the {thing.name} does not show"
        assert not (changed & ~allowed).any()


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_category_shows_its_colour(category):
    for colour in COLOURS:
        thing = Thing(category, colour, "large", "top", "left", (0.5, 0.5), 0.5)
        image = np.asarray(draw_image(Scene("snow", (thing,), 7))).astype(int)[40:120, 40:120]
        near = np.abs(image - np.array(PAINT[colour])).max(axis=-1) < 24
        assert near.mean() > 0.08, f"a {colour} {category} is hardly {colour}"


def test_coco_files_hold_the_scenes(tmp_path):
    scenes = draw_scenes(6, 8, "train")
    write_split(tmp_path, scenes, workers=2)
    counts = ContextCounts()
    contexts = list(read_contexts(tmp_path / "captions.json", tmp_path / "instances.json", counts=counts))
    assert len(contexts) == 6 and not counts.dropped and not counts.clipped
    for context, scene in zip(contexts, scenes):
        assert (tmp_path / "images" / context.image).is_file()
        assert list(context.captions) == write_captions(scene)
        by_category = {box.category: box.corners for box in context.boxes}
        assert set(by_category) == {thing.category for thing in scene.things}
        for thing in scene.things:
            (x, y), half = thing.centre, thing.side / 2
            assert by_category[thing.category] == pytest.approx((x - half, y - half, x + half, y + half), abs=1e-4)
