"""Preparing images with captions: every caption becomes its ids, and whatever is lost is counted and said."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from diversedit_jax import data
from diversedit_jax.data import image_collections, latents
from diversedit_jax.data.clip_tokenizer import open_tokenizer
from diversedit_jax.errors import ConfigError, DataError
from diversedit_jax.models import vae
from diversedit_jax.weights import vae as published
from tests import DATA, ROOT
from tests.data.test_image_collections import encoded, picture
from tests.tools.test_prepare_latents import ARCH, SIZE, content
from tools import latent_shards, prepare_latents
from tools.prepare_latents import Options

TOKENIZER = DATA / "clip_tokenizer"
LONG = "the " * 300
# COCO's image id -> captions in the order of their ids. Image 4 is damaged; 8 has an empty caption, 9 nothing else.
CAPTIONS = {
    7: ["a cat 🐱", "two cats, on the left"],
    2: ["a dog"],
    4: ["the damaged one"],
    5: [LONG, "a dog", "naïve Ærø"],
    8: [" ", "a cat"],
    9: ["", "\n"],
    3: ["a", "b", "c"],
}
GOOD = [2, 3, 5, 7, 8]


def name(number: int) -> str:
    return f"COCO_train2014_{number:012d}.png"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Images in COCO's layout, one of which has no annotation at all, and an autoencoder."""
    home = tmp_path_factory.mktemp("captioned")
    folder = home / "coco" / "train2014"
    folder.mkdir(parents=True)
    for number in (*CAPTIONS, 1):
        (folder / name(number)).write_bytes(encoded(picture(number, (20 + number, 17))))
    (folder / name(4)).write_bytes(b"")
    images = [{"id": number, "file_name": name(number)} for number in (*CAPTIONS, 77)]
    texts = [(number, text) for number, texts in CAPTIONS.items() for text in texts] + [(77, "no image")]
    found = [{"id": i, "image_id": number, "caption": text} for i, (number, text) in enumerate(texts)]
    (home / "coco/annotations").mkdir()
    (home / "coco/annotations/captions_train2014.json").write_text(
        json.dumps({"images": images, "annotations": found[::-1]})
    )
    network = vae.network(ARCH)
    published.export(jax.jit(network.init)(jax.random.key(0)), ARCH, home / "vae", scale=0.5)
    return home


def prepare(home, out, images=None, **options):
    given = {"vae": str(home / "vae"), "size": SIZE, "per_shard": 3, "batch_size": 8, "tokenizer": str(TOKENIZER)}
    prepare_latents.prepare(images or home / "coco", out, Options(**given | {"crop": "lanczos"} | options))
    return out


@pytest.fixture(scope="module")
def straight(home):
    """The set of a run that nothing disturbed."""
    return prepare(home, home / "straight", image="png")


def test_records_hold_latents_ids_and_captions_of_every_image(home, straight):
    dataset = data.make("latents", "train", data_dir=str(straight), image=True)
    tokenizer = open_tokenizer(TOKENIZER)
    assert dataset.text == {"sha256": tokenizer.sha256, "vocabulary": 535, "length": 77}
    assert (dataset.space.shape, dataset.space.conditions.classes, dataset.scale) == ((8, 8, 4), None, 0.5)
    np.testing.assert_array_equal(dataset.space.conditions.null, tokenizer([""]).ids[0])
    assert len(dataset.source) == len(GOOD)
    network, params = vae.network(ARCH), published.open_vae(home / "vae").read()
    encode = jax.jit(network.encode)
    images = image_collections.open_images(home / "coco", split="train2014", unconditional=True)
    for row, number in enumerate(GOOD):
        example = dataset.source[row]
        texts = [text.strip() for text in CAPTIONS[number] if text.strip()]
        ids = tokenizer(texts).ids
        np.testing.assert_array_equal(example["y"], ids[0])
        np.testing.assert_array_equal(example.get("captions", ids[:1]), ids)
        crop = image_collections.crop(images, images.keys.index(name(number)), SIZE, "lanczos")
        np.testing.assert_array_equal(example["image"], crop)
        moments = encode(params, crop[None].astype(np.float32) / 127.5 - 1)[0]
        np.testing.assert_allclose(example["moments"], moments, rtol=2e-3, atol=2e-3)  # float16
        stored = latents.parsed(dataset.source.records[row])
        assert [text.decode() for text in stored["text"].bytes_list.value] == texts
        assert "label" not in stored
    long = dataset.source[GOOD.index(5)]["captions"][0]
    assert np.flatnonzero(long == tokenizer.end).tolist() == [76], "300 words fill all places but the last one"


def test_the_report_counts_what_is_lost(straight, home, tmp_path, capsys):
    report = json.loads((straight / "report.json").read_text())
    assert report["skipped"] == {
        name(4): "an empty file",
        name(9): "its captions are empty",
        name(1): "no caption",
    }
    assert (report["images"], report["records"], report["left_out"]) == (8, 5, {"empty": 3})
    assert (report["captions_written"], report["captions_cut"]) == (10, 1)
    assert report["ignored"] == {"caption without an image": 1}
    about = latent_shards.whole(straight)
    tokenizer = open_tokenizer(TOKENIZER)
    said = {"sha256": tokenizer.sha256, "vocabulary": 535, "length": 77, "start": 533, "end": 534}
    assert (about["captions"], about["crop"], about["classes"]) == (said, "lanczos", None)
    assert (about["captions_written"], about["captions_cut"]) == (10, 1)
    prepare(home, tmp_path)
    printed = capsys.readouterr()
    assert "10 captions, 1 cut at 77 tokens, 3 empty ones left out" in printed.out
    assert "11 captions; 2 images have none" in printed.err
    assert f"skipped: {name(9)}: its captions are empty" in printed.out


def test_processes_share_the_work_and_a_run_goes_on_to_the_same_set(home, straight, tmp_path, monkeypatch):
    for index in (2, 0, 1):
        prepare(home, tmp_path / "shared", image="png", process_index=index, process_count=3)

    def breaks(folder, plan, shard, records, *counts):
        if shard == 1:
            next(iter(records))
            raise KeyboardInterrupt
        return write(folder, plan, shard, records, *counts)

    write = latent_shards.write_shard
    monkeypatch.setattr(latent_shards, "write_shard", breaks)
    with pytest.raises(KeyboardInterrupt):
        prepare(home, tmp_path / "resumed", image="png")
    monkeypatch.undo()
    prepare(home, tmp_path / "resumed", image="png")
    for folder in (tmp_path / "shared", tmp_path / "resumed"):
        assert content(folder) == content(straight)
        for file in ("latents.json", "report.json"):
            assert json.loads((folder / file).read_text()) == json.loads((straight / file).read_text())


def test_other_captions_and_another_tokenizer_are_another_set(home, straight, tmp_path):
    (tmp_path / "vocab.json").write_bytes((TOKENIZER / "vocab.json").read_bytes())
    (tmp_path / "merges.txt").write_text((TOKENIZER / "merges.txt").read_text().rstrip().rpartition("\n")[0])
    with pytest.raises(ConfigError, match=r"holds a set with other settings \(.*captions.*sha256"):
        prepare(home, straight, image="png", tokenizer=str(tmp_path))
    text = (home / "coco/annotations/captions_train2014.json").read_text()
    (tmp_path / "captions.json").write_text(text.replace("a dog", "a dot"))
    with pytest.raises(ConfigError, match=r"holds a set with other settings \(.*collection"):
        prepare(home, straight, image="png", captions=str(tmp_path / "captions.json"), split="train2014")
    with pytest.raises(ConfigError, match=r"crop: 'lanczos' there, 'adm' given"):
        prepare(home, straight, image="png", crop="adm")


def test_with_strict_an_image_without_a_caption_is_an_error(home, tmp_path):
    with pytest.raises(DataError, match=rf"{name(9)}: its captions are empty; 2 of 8 images have no caption"):
        prepare(home, tmp_path / "out", strict=True)
    assert not (tmp_path / "out").exists()


def test_what_cannot_work_is_said_at_once(home, tmp_path):
    for options, error, words in [
        ({"tokenizer": None, "captions": "captions.csv"}, ConfigError, "--captions needs --tokenizer"),
        ({"tokenizer": str(tmp_path)}, DataError, "has no vocab.json: wanted vocab.json and merges.txt"),
        ({"captions": str(home / "none.csv"), "split": "train2014"}, DataError, "none.csv: No such file"),
    ]:
        with pytest.raises(error, match=words):
            prepare(home, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_set_with_captions_is_verified(home, straight, capsys):
    prepare_latents.verify(straight, home / "vae", "highest")
    printed = capsys.readouterr().out
    assert "is whole: 5 records in 3 shards" in printed
    assert "PSNR of the reconstructions of 5 images: " in printed


@pytest.mark.slow
def test_the_command_prepares_a_table(home, tmp_path):
    for number in (1, 2):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{number}.png").write_bytes(encoded(picture(number)))
    (tmp_path / "table.csv").write_text("file_name,caption\n1.png,a cat\n2.png,a dog\n1.png,two cats\n")
    arguments = [tmp_path / "images", tmp_path / "out", f"--vae={home / 'vae'}", "--size=16", "--crop=lanczos"]
    arguments += [f"--tokenizer={TOKENIZER}", f"--captions={tmp_path / 'table.csv'}"]
    command = [sys.executable, "-m", "tools.prepare_latents", *map(str, arguments)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    dataset = data.make("latents", "train", data_dir=str(tmp_path / "out"))
    np.testing.assert_array_equal(dataset.source[0]["captions"], open_tokenizer(TOKENIZER)(["a cat", "two cats"]).ids)
