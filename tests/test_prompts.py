"""Prompts against hand-written spans and against open_clip's own tokenizer."""

import json

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from moa_train.prompts import mark_prompt, parse_prompt, tokenize

REFERENCE = open_clip.get_tokenizer("ViT-B-32")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The tokenizer of Stable Diffusion, made of the vocabulary that open_clip carries."""
    folder = tmp_path_factory.mktemp("tokenizer")
    merges = [f"{left} {right}" for left, right in REFERENCE.bpe_ranks]
    vocabulary = {
        {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}.get(token, token): index
        for token, index in REFERENCE.encoder.items()
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def piece(ids, position):
    """Text of one token."""
    return REFERENCE.decode([int(ids[position])]).strip()


def test_parse_takes_the_markers_out_and_names_the_nouns():
    prompt = parse_prompt("a photo of a man <1> and a woman<2>, at the beach")
    assert prompt.text == "a photo of a man and a woman, at the beach"
    assert prompt.subjects == (0, 1)
    assert [prompt.text[start:end] for start, end in prompt.spans] == ["man", "woman"]


def test_subjects_keep_their_numbers_in_any_order_of_appearance():
    prompt = parse_prompt("a woman <2> beside a snow-man <1>")
    assert prompt.subjects == (1, 0)
    assert [prompt.text[start:end] for start, end in prompt.spans] == ["woman", "snow-man"]


def test_a_prompt_without_markers_is_left_alone():
    assert parse_prompt("a < 1 > b <a>  ").text == "a < 1 > b <a>  "


@pytest.mark.parametrize(
    "marked",
    ["<1> a man", "a man, <1>", "a man <1> <2>", "a man <2>", "a man <0>", "a man <1> <1>", "a man <10>"],
)
def test_prompts_that_mark_no_clear_noun_are_refused(marked):
    with pytest.raises(ValueError, match=r"marks subjects|no noun of its own"):
        parse_prompt(marked)


words = st.lists(st.from_regex(r"[a-zà-öø-ÿ]{1,8}", fullmatch=True), min_size=2, max_size=8)


@given(words=words, data=st.data())
def test_parsing_inverts_marking(words, data):
    caption = " ".join(words)
    chosen = data.draw(st.lists(st.integers(0, len(words) - 1), unique=True, max_size=4))
    starts = [len(" ".join(words[:index])) + (index > 0) for index in chosen]
    spans = [(start, start + len(words[index])) for start, index in zip(starts, chosen, strict=True)]
    prompt = parse_prompt(mark_prompt(caption, spans))
    assert prompt.text == caption
    assert {spans[subject] for subject in prompt.subjects} == set(spans)
    assert [spans[subject] for subject in prompt.subjects] == list(prompt.spans)


def test_marking_ends_at_the_last_word_of_a_noun_phrase():
    assert mark_prompt("an old man, at sea", [(0, 11)]) == "an old man <1>, at sea"


@pytest.mark.parametrize("spans", [[(0, 3), (2, 3)], [(3, 4)], [(9, 12)]])
def test_marking_refuses_shared_ends_and_empty_spans(spans):
    with pytest.raises(ValueError, match=r"end at character|holds no word"):
        mark_prompt("man  and", spans)


def test_marking_refuses_a_caption_with_markers():
    with pytest.raises(ValueError, match="already has markers"):
        mark_prompt("a man <1>", [(2, 5)])


@pytest.mark.parametrize(
    ("marked", "expected"),
    [
        ("a photo of a man <1> and a woman <2> at the beach", {0: "man", 1: "woman"}),
        ("a woman <2> and a man <1>", {0: "man", 1: "woman"}),
        ("the man <1>'s hat", {0: "man"}),
        ("a MAN <1>!", {0: "man"}),
        ("a   photo  of a velociraptor <1> here", {0: "raptor"}),
        ("nothing marked", {}),
    ],
)
def test_ids_are_those_of_clip_and_positions_point_at_the_last_piece_of_each_noun(tokenizer, marked, expected):
    prompt = parse_prompt(marked)
    result = tokenize(tokenizer, prompt, slots=3)
    reference = REFERENCE([prompt.text])[0]
    length = int(reference.argmax()) + 1
    assert torch.equal(result.ids[:length], reference[:length])
    assert len(result.ids) == 77
    assert result.present.tolist() == [slot in expected for slot in range(3)]
    assert {slot: piece(result.ids, result.positions[slot]) for slot in expected} == expected
    assert (result.positions[~result.present] == 0).all()


def test_a_subject_at_two_nouns_has_a_slot_at_each_beside_those_of_the_others(tokenizer):
    prompt = parse_prompt("a man <1>, a woman <2> and his twin, a boy <1>")
    assert (prompt.count, prompt.owners) == (2, (0, 0, 1))
    result = tokenize(tokenizer, prompt, slots=3)
    assert [piece(result.ids, position) for position in result.positions] == ["man", "boy", "woman"]
    with pytest.raises(ValueError, match="marks 3 subjects, max_subjects is 2"):
        tokenize(tokenizer, prompt, slots=2)


def test_a_long_prompt_keeps_its_end_token_and_its_early_nouns(tokenizer):
    result = tokenize(tokenizer, parse_prompt("a man <1> " + "and so on " * 40), slots=1)
    assert result.ids[-1] == tokenizer.eos_token_id
    assert result.ids.shape == (77,)
    assert piece(result.ids, result.positions[0]) == "man"


def test_a_noun_behind_the_last_token_is_named(tokenizer):
    last = parse_prompt("a " * 74 + "man <1>")
    assert tokenize(tokenizer, last, slots=1).positions.tolist() == [75]
    with pytest.raises(ValueError, match="'man' <1> is token 76 of 77"):
        tokenize(tokenizer, parse_prompt("a " * 75 + "man <1>"), slots=1)


def test_more_subjects_than_slots_are_refused(tokenizer):
    with pytest.raises(ValueError, match="max_subjects is 1"):
        tokenize(tokenizer, parse_prompt("a man <1> and a woman <2>"), slots=1)


def test_a_tokenizer_without_a_length_is_refused(tokenizer):
    class Endless:
        model_max_length = 10**30

        def __call__(self, text, **options):
            return tokenizer(text, **options)

    with pytest.raises(ValueError, match="model_max_length"):
        tokenize(Endless(), parse_prompt("a man <1>"), slots=1)
