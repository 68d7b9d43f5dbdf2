"""Generation: prompts to files, the same whatever the batch, the task and the place that the model comes from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from regen_dist.config.embedder import EmbedderConfig
from regen_dist.config.t2v import T2VConfig
from regen_dist.errors import CheckpointError, ConfigError, DataError
from regen_dist.evaluation.miniature_scores import generated_names
from regen_dist.inference.codec import Codec
from regen_dist.inference.export import ExportOptions, export_model
from regen_dist.inference.frames import SourceVideo
from regen_dist.inference.generate import Generated, Layout, Prompt, embed_prompts, generate, read_prompts, sample_rows
from regen_dist.inference.generation_settings import clips_for, frame_positions, resolve_settings
from regen_dist.inference.sampler import TextToVideoModel
from tests.helpers.checkpoints import saved_run
from tests.helpers.t2v import CPU, WordEncoder, latent_space, saved_t2v

PROMPTS = [Prompt(n, text) for n, text in enumerate(["a red square", "a dog", "two small blue circles move left"])]
LONG = "one two three four five six seven eight"


class Made(NamedTuple):
    """A trained embedder and a text-to-video run on its latents, as configs and loaded."""

    embedder: EmbedderConfig
    run: T2VConfig
    model: TextToVideoModel
    codec: Codec


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("generate")
    embedder = saved_run(folder)
    run = saved_t2v(folder, embedder)
    return Made(embedder, run, TextToVideoModel.load(run.folder, device=CPU), Codec.load(embedder.folder, device=CPU))


def _settings(made: Made, **changes: Any) -> Any:
    return resolve_settings(made.model, **{"steps": 2, **changes})


def _generate(
    made: Made, out: Path, prompts: list[Prompt] = PROMPTS, *, model: TextToVideoModel | None = None, batch: int = 8,
    encoder: WordEncoder | None = None, **changes: Any,
) -> Generated:  # fmt: skip
    model = model or made.model
    settings = _settings(made, **changes)
    return generate(model, made.codec, lambda: encoder or WordEncoder(), prompts, out, settings, batch=batch)


def _rows(made: Made, prompts: list[Prompt], model: TextToVideoModel | None = None, **changes: Any) -> list[Any]:
    model = model or made.model
    settings = _settings(made, **changes)
    found = embed_prompts(WordEncoder(), model.space, prompts, settings.negative)
    return sample_rows(model, prompts, found.texts, found.null, settings)


def _content(rows: list[Any]) -> torch.Tensor:
    return torch.stack([each.content for each in rows])


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.suffix != ".json"}


class TestFiles:
    """A video and a JSON file for each prompt, by its number."""

    def test_what_is_written(self, made: Made, tmp_path: Path) -> None:
        """A row of one clip as trained: its frames, sides and rate; the record says everything that makes it again."""
        found = _generate(made, tmp_path / "out")
        assert found == Generated(PROMPTS, [], [])
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
            f"0000{n}.{kind}" for n in range(3) for kind in ("json", "mp4")
        )
        video = SourceVideo(tmp_path / "out" / "00002.mp4")
        assert (video.num_frames, video.height, video.width, float(video.rate)) == (5, 32, 32, 8.0)
        record = json.loads((tmp_path / "out" / "00002.json").read_text())
        assert (record["prompt"], record["number"], record["file"]) == (PROMPTS[2].text, 2, "00002.mp4")
        assert record["settings"] == asdict(_settings(made))
        facts = {name: record["model"][name] for name in ("run", "step", "weights")}
        assert facts == {"run": "tiny_t2v", "step": 7, "weights": "ema"}
        assert record["embedder"]["fingerprint"] == made.model.space.facts["encoder"]["fingerprint"]
        assert record["text_encoder"]["fingerprint"] == "stand-in"
        assert record.keys() >= {"version", "machine", "paths", "space", "clips"}

    def test_a_second_call_makes_what_is_missing_alone(self, made: Made, tmp_path: Path) -> None:
        """Nothing is made twice, and the text encoder not even loaded; a lost or damaged record, a lost video, and
        another prompt of the same number are made anew."""
        _generate(made, tmp_path)
        before = _bytes(tmp_path)

        def never() -> WordEncoder:
            raise AssertionError("there is nothing to embed")

        again = generate(made.model, made.codec, never, PROMPTS, tmp_path, _settings(made))
        assert (again.made, again.skipped) == ([], PROMPTS)
        (tmp_path / "00000.json").write_text("{")
        (tmp_path / "00001.mp4").unlink()
        assert _generate(made, tmp_path).made == PROMPTS[:2]
        assert _bytes(tmp_path).keys() == before.keys()
        assert _generate(made, tmp_path, [Prompt(1, "another")]).made == [Prompt(1, "another")]

    @pytest.mark.parametrize("change", [{"seed": 1}, {"guidance": 1.0}, {"fps": 4.0}, {"negative": "a cat"}])
    def test_other_settings_are_another_video(self, made: Made, tmp_path: Path, change: dict[str, Any]) -> None:
        _generate(made, tmp_path, PROMPTS[:1])
        assert _generate(made, tmp_path, PROMPTS[:1], **change).made == PROMPTS[:1]

    def test_the_record_never_vouches_for_another_video(self, made: Made, tmp_path: Path) -> None:
        """When making a video anew fails, the old record is gone."""
        _generate(made, tmp_path, PROMPTS[:1])
        (tmp_path / "00000.mp4").unlink()
        (tmp_path / "00000.mp4").mkdir()
        with pytest.raises(DataError, match="cannot be written"):
            _generate(made, tmp_path, PROMPTS[:1])
        assert not (tmp_path / "00000.json").exists()

    def test_images(self, made: Made, tmp_path: Path) -> None:
        """One frame is a PNG, of a content latent alone; it takes the place of a video of the same number."""
        _generate(made, tmp_path, PROMPTS[:1])
        _generate(made, tmp_path, PROMPTS[:1], frames=1, size=(48, 32))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.json", "00000.png"]
        assert Image.open(tmp_path / "00000.png").size == (32, 48)
        (row,) = _rows(made, PROMPTS[:1], frames=1)
        assert not row.motion.any()


class TestSamples:
    """Several videos of a prompt, each with a seed of its own, under names that say which is which."""

    def test_names_and_seeds(self, made: Made, tmp_path: Path) -> None:
        """Sample i has seed + i: alone, with that seed, it is the very video. The first is that of a single sample."""
        layout = Layout(samples=3)
        prompts = layout.expanded(PROMPTS[:2])
        settings = _settings(made, seed=5)
        generate(made.model, made.codec, WordEncoder, prompts, tmp_path, settings, layout=layout, batch=1)
        names = [f"0000{n}-{sample}" for n in range(2) for sample in range(3)]
        assert sorted(path.stem for path in tmp_path.glob("*.mp4")) == names == generated_names(tmp_path, 9)
        videos = _bytes(tmp_path)
        assert len(set(videos.values())) == 6
        for sample in range(3):
            _generate(made, tmp_path / "alone", PROMPTS[:1], seed=5 + sample, batch=1)
            assert (tmp_path / "alone" / "00000.mp4").read_bytes() == videos[f"00000-{sample}.mp4"]
        record = json.loads((tmp_path / "00001-2.json").read_text())
        assert (record["sample"], record["seed"], record["file"]) == (2, 7, "00001-2.mp4")
        found = generate(made.model, made.codec, WordEncoder, prompts, tmp_path, settings, layout=layout)
        assert (found.made, len(found.skipped)) == ([], 6)

    def test_as_vbench_reads_them(self, made: Made, tmp_path: Path) -> None:
        """{prompt}-{i}.mp4, and nothing but videos in the folder: VBench takes the first name's ending for all."""
        out, layout = tmp_path / "out", Layout(samples=2, by_prompt=True)
        prompts = layout.expanded([Prompt(0, "a person's face, smiling"), Prompt(1, "Ein Übergang")])
        for _ in range(2):
            found = generate(made.model, made.codec, WordEncoder, prompts, out, _settings(made), layout=layout)
        assert (found.made, len(found.skipped)) == ([], 4)
        stems = [f"{prompt.text}-{prompt.sample}" for prompt in prompts]
        assert sorted(path.name for path in out.iterdir()) == sorted(f"{stem}.mp4" for stem in stems)
        assert sorted(path.stem for path in (tmp_path / "out-records").iterdir()) == sorted(stems)

    def test_records_lie_beside_the_working_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """--out . has no name of its own."""
        (tmp_path / "out").mkdir()
        monkeypatch.chdir(tmp_path / "out")
        assert Layout(by_prompt=True).records(Path(".")) == tmp_path / "out-records"

    def test_the_longest_name_is_written(self, made: Made, tmp_path: Path) -> None:
        """The longest that `expanded` allows; temporary names are longer than the file's own."""
        layout = Layout(by_prompt=True)
        prompts = layout.expanded([Prompt(0, "x" * 248)])
        generate(made.model, made.codec, WordEncoder, prompts, tmp_path / "out", _settings(made), layout=layout)
        assert [len(path.name) for path in (tmp_path / "out").iterdir()] == [254]

    @pytest.mark.parametrize("text", ["a/b", "x" * 250, "é" * 126, ".hidden", "a dog", "nul\0"])
    def test_prompts_that_are_no_file_names(self, text: str) -> None:
        """All of them are told before anything is made; numbered files take every prompt."""
        prompts = [Prompt(0, "a dog"), Prompt(1, text)]
        with pytest.raises(ConfigError, match=r"no files can be called by these prompts: .* leave --layout out"):
            Layout(by_prompt=True).expanded(prompts)
        assert len(Layout(samples=2).expanded(prompts)) == 4
        with pytest.raises(ConfigError, match="at least 1"):
            Layout(samples=0).expanded(prompts)


class TestWhereItIsMade:
    """Batches, tasks, a run or its export: the same videos."""

    def test_the_batch_changes_rounding_alone(self, made: Made) -> None:
        """Together and alone, in another order, beside longer texts: the noise is the prompt's own."""
        together = _content(_rows(made, PROMPTS))
        for place in (2, 0, 1):
            alone = _content(_rows(made, [PROMPTS[place]]))
            torch.testing.assert_close(alone[:, 0], together[:, place], rtol=1e-4, atol=1e-5)
        assert (together[:, 0] - together[:, 1]).abs().max() > 0.1

    def test_tasks_give_the_bytes_of_one_call(self, made: Made, tmp_path: Path) -> None:
        """Two tasks that share the prompts leave what one call leaves."""
        _generate(made, tmp_path / "one", batch=1)
        for task in range(2):
            _generate(made, tmp_path / "two", PROMPTS[task::2], batch=1)
        assert _bytes(tmp_path / "one") == _bytes(tmp_path / "two")
        assert len(_bytes(tmp_path / "two")) == 3

    def test_an_export_generates_as_its_run_does(self, made: Made, tmp_path: Path) -> None:
        """The same bytes; even the records say the same model, so that nothing is made twice."""
        export_model(made.run.folder, tmp_path / "model", ExportOptions())
        exported = TextToVideoModel.load(tmp_path / "model", device=CPU)
        _generate(made, tmp_path / "run")
        _generate(made, tmp_path / "export", model=exported)
        assert _bytes(tmp_path / "run") == _bytes(tmp_path / "export")
        assert _generate(made, tmp_path / "run", model=exported).made == []


class TestWeights:
    """Which weights generate."""

    def test_averaged_ones_by_default(self, made: Made) -> None:
        """Those of the last step make something else; they are taken when asked for."""
        default = _content(_rows(made, PROMPTS[:1]))
        ema, plain = (TextToVideoModel.load(made.run.folder, kind, CPU) for kind in ("ema", "plain"))
        assert torch.equal(default, _content(_rows(made, PROMPTS[:1], ema)))
        assert not torch.allclose(default, _content(_rows(made, PROMPTS[:1], plain)), atol=1e-3)
        assert (made.model.facts()["weights"], plain.facts()["weights"]) == ("ema", "plain")

    def test_an_export_has_one_kind(self, made: Made, tmp_path: Path) -> None:
        export_model(made.run.folder, tmp_path / "model", ExportOptions(weights="plain"))
        assert TextToVideoModel.load(tmp_path / "model", device=CPU).facts()["weights"] == "plain"
        with pytest.raises(CheckpointError, match="holds the plain weights alone"):
            TextToVideoModel.load(tmp_path / "model", "ema", CPU)

    def test_untrained(self, made: Made, tmp_path: Path) -> None:
        """The weights that training begins with, which predict nothing yet: noise in the scale of the latents. Of a
        run and of its export alike, without any checkpoint; torch's own generator stays as it was."""
        export_model(made.run.folder, tmp_path / "model", ExportOptions())
        run = Path(shutil.copytree(made.run.folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))
        before = torch.random.get_rng_state()
        models = [TextToVideoModel.load(path, device=CPU, untrained=True) for path in (run, tmp_path / "model")]
        assert torch.equal(before, torch.random.get_rng_state())
        one, other = (_content(_rows(made, PROMPTS[:1], model)) for model in models)
        assert torch.equal(one, other)
        assert not torch.allclose(one, _content(_rows(made, PROMPTS[:1])), atol=1e-3)
        assert models[0].facts() == models[1].facts()
        assert models[0].facts()["weights"] == "untrained"

    def test_what_is_no_text_to_video_model(self, made: Made, tmp_path: Path) -> None:
        """An embedder's run and its export are told by name; so is a run without its latent space."""
        export_model(made.embedder.folder, tmp_path / "model", ExportOptions(statistics_clips=0))
        with pytest.raises(ConfigError, match="config of task 'embedder'; this needs one of text to video"):
            TextToVideoModel.load(made.embedder.folder, device=CPU)
        with pytest.raises(CheckpointError, match="is an embedder; this needs a text-to-video model"):
            TextToVideoModel.load(tmp_path / "model", device=CPU)
        bare = shutil.copytree(made.run.folder, tmp_path / "run", ignore=shutil.ignore_patterns("latent_space"))
        with pytest.raises(CheckpointError, match="has begun to train"):
            TextToVideoModel.load(bare, device=CPU)


class TestShapes:
    """Sizes, lengths and rates that were not trained on."""

    @pytest.mark.parametrize(
        ("frames", "fps", "clips"), [(1, 8, 1), (2, 8, 1), (5, 8, 1), (6, 8, 2), (10, 16, 1), (11, 16, 2), (3, 2, 2)]
    )
    def test_clips_that_a_length_needs(self, made: Made, frames: int, fps: float, clips: int) -> None:
        """Frames need not be a multiple of the clip's five; at twice the rate they lie twice as densely, and past the
        last frame by less than one."""
        positions = frame_positions(_settings(made, frames=frames, fps=fps), 8.0)
        assert clips_for(positions, 5) == clips

    def test_positions_are_not_lost_to_rounding(self, made: Made) -> None:
        """33 frames at 30 a second of what was 24 a second, and back: whole positions stay whole."""
        positions = frame_positions(_settings(made, frames=100, fps=30.0), 24.0)
        assert all(float(positions[5 * n]) == 4 * n for n in range(20))

    def test_other_lengths_sizes_and_rates(self, made: Made, tmp_path: Path) -> None:
        """Seven frames at three quarters of the rate, a wide picture: two clips, where one was trained on."""
        _generate(made, tmp_path, PROMPTS[:1], frames=7, fps=6.0, size=(32, 64))
        video = SourceVideo(tmp_path / "00000.mp4")
        assert (video.num_frames, video.height, video.width, float(video.rate)) == (7, 32, 64, 6.0)
        assert json.loads((tmp_path / "00000.json").read_text())["clips"] == 2

    def test_the_rate_changes_nothing_but_times(self, made: Made, tmp_path: Path) -> None:
        """Every second frame of a video at twice the rate is a frame of the one at its own, as near as coding leaves
        it."""
        _generate(made, tmp_path / "own", PROMPTS[:1])
        _generate(made, tmp_path / "twice", PROMPTS[:1], frames=9, fps=16.0)
        own, twice = (
            np.stack(list(SourceVideo(tmp_path / name / "00000.mp4").frames())).astype(float)
            for name in ("own", "twice")
        )
        assert np.abs(own - twice[::2]).mean() < 0.3 * np.abs(own[:-1] - own[1:]).mean()

    def test_more_clips_begin_with_the_same_noise(self, made: Made) -> None:
        """A longer row is another sample, but not by its noise: untrained models give the same first clip."""
        model = TextToVideoModel.load(made.run.folder, device=CPU, untrained=True)
        one, three = (_rows(made, PROMPTS[:1], model, frames=frames) for frames in (5, 15))
        assert (len(one), len(three)) == (1, 3)
        torch.testing.assert_close(one[0], three[0])

    def test_bf16_models_generate(self, tmp_path: Path) -> None:
        """Embedder and generator in bf16: latents are float32 between them, and the decoder takes them."""
        embedder = saved_run(tmp_path, engine__precision="bf16")
        run = saved_t2v(tmp_path, embedder, engine__precision="bf16")
        model, codec = (
            kind.load(each.folder, device=CPU) for kind, each in ((TextToVideoModel, run), (Codec, embedder))
        )
        settings = resolve_settings(model, steps=1)
        generate(model, codec, WordEncoder, PROMPTS[:1], tmp_path / "out", settings)
        assert SourceVideo(tmp_path / "out" / "00000.mp4").num_frames == 5


class TestSettings:
    """Settings that are not given are as trained; impossible ones are refused, all at once."""

    def test_defaults(self, made: Made) -> None:
        settings = resolve_settings(made.model)
        assert (settings.height, settings.width, settings.frames, settings.fps) == (32, 32, 5, 8.0)
        assert (settings.steps, settings.guidance, settings.sampler) == (4, 2.0, "euler")

    def test_caches_of_several_sizes(self, made: Made) -> None:
        """The largest of them is taken; where none is recorded, the paper's."""
        for buckets, expected in ((((32, 32), (32, 48), (48, 16)), (32, 48)), ((), (192, 320))):
            model = TextToVideoModel(made.model.model, made.model.config, latent_space(buckets=buckets), CPU, {})
            settings = resolve_settings(model)
            assert (settings.height, settings.width) == expected

    def test_all_problems_at_once(self, made: Made) -> None:
        with pytest.raises(ConfigError) as caught:
            resolve_settings(made.model, size=(100, 32), frames=0, fps=0.0, steps=0, guidance=-1.0, seed=2**63)
        for text in (
            "size is 100x32; sides are multiples of 16, the nearest is 96x32", "frames is 0; it must be at least 1",
            "fps is 0; it must be above 0", "steps is 0", "guidance is -1",
            "seed is 9223372036854775808; it must be at most",
        ):  # fmt: skip
            assert text in str(caught.value)

    @pytest.mark.parametrize("fps", [1e-4, 1e12])
    def test_rates_that_no_file_has(self, made: Made, fps: float) -> None:
        with pytest.raises(ConfigError, match="it must be above 0, from 1/1001 to 1000"):
            resolve_settings(made.model, fps=fps)

    def test_a_guidance_that_overflows(self, made: Made) -> None:
        with pytest.raises(ConfigError, match="guidance is 1e\\+30; it must be at most 1000"):
            resolve_settings(made.model, guidance=1e30)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("name", ["fps", "guidance"])
    def test_what_is_not_finite_is_refused(self, made: Made, name: str, value: float) -> None:
        with pytest.raises(ConfigError, match=f"{name} is -?(nan|inf); it must be finite"):
            resolve_settings(made.model, **{name: value})

    def test_a_folder_that_cannot_be_made(self, made: Made, tmp_path: Path) -> None:
        """Refused at once, before the text encoder is loaded and anything is sampled."""
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match="file"):
            generate(made.model, made.codec, lambda: pytest.fail("loaded"), PROMPTS, tmp_path / "file", _settings(made))

    def test_an_empty_batch(self, made: Made, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="--batch 0: it must be at least 1"):
            _generate(made, tmp_path, batch=0)


class TestTexts:
    """Prompts are embedded as captions were."""

    def test_another_text_encoder_is_refused(self, made: Made, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"not the one that the caches were made with .* give that one"):
            _generate(made, tmp_path, encoder=WordEncoder("other"))
        assert not list(tmp_path.iterdir())

    def test_another_embedder_is_refused(self, made: Made, tmp_path: Path) -> None:
        """Its latents mean something else."""
        codec = Codec.load(saved_run(tmp_path, step=8).folder, device=CPU)
        codec.model.encoder.load_state_dict({n: t + 0.01 for n, t in codec.model.encoder.state_dict().items()})
        with pytest.raises(CheckpointError, match="is not the one that the latents were made with"):
            generate(made.model, codec, WordEncoder, PROMPTS, tmp_path / "out", _settings(made))

    @pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
    @pytest.mark.parametrize("end", [b"\n", b"\r\n"])
    def test_prompts_of_a_file_of_any_editor(self, tmp_path: Path, mark: bytes, end: bytes) -> None:
        """A byte-order mark is no text; lines end at a newline alone, and what else Unicode breaks at stays."""
        texts = ["a red circle", "two\u2028lines\x85of one\x0bprompt", "Ende"]
        (tmp_path / "p.txt").write_bytes(mark + end.join(text.encode() for text in [texts[0], "", *texts[1:]]))
        assert read_prompts(tmp_path / "p.txt") == [Prompt(number, text) for number, text in enumerate(texts)]

    def test_embeddings_are_rounded_as_in_a_cache(self, made: Made) -> None:
        found = embed_prompts(WordEncoder(), made.model.space, PROMPTS)
        for text, whole in zip(found.texts, WordEncoder().encode([each.text for each in PROMPTS]), strict=True):
            assert torch.equal(text, whole.bfloat16().float())
        assert torch.equal(found.null, made.model.space.null_text.text)

    def test_long_prompts_are_told(self, made: Made, tmp_path: Path) -> None:
        assert _generate(made, tmp_path, [Prompt(0, LONG), Prompt(1, "short")]).cut == [LONG]
        assert _generate(made, tmp_path, [Prompt(1, "short")], negative=LONG).cut == [LONG]

    def test_a_long_list_is_embedded_one_by_one(self, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
        """All at once they would fill a GPU; samples of a prompt share its embedding, and one warning."""
        calls: list[list[str]] = []
        encode = WordEncoder.encode

        def noted(self: WordEncoder, texts: Sequence[str]) -> list[torch.Tensor]:
            calls.append([*texts])
            return encode(self, texts)

        monkeypatch.setattr(WordEncoder, "encode", noted)
        prompts = Layout(samples=3).expanded([Prompt(0, LONG), Prompt(1, "short")])
        found = embed_prompts(WordEncoder(), made.model.space, prompts, "negative")
        assert calls == [[LONG], ["short"], ["negative"]]
        assert found.texts[0] is found.texts[2]
        assert found.cut == [LONG]

    def test_a_negative_prompt_leads_elsewhere(self, made: Made) -> None:
        """With guidance alone: at 1 nothing is led away from."""
        for guidance, same in ((3.0, False), (1.0, True)):
            found = [
                _content(_rows(made, PROMPTS[:1], guidance=guidance, negative=text)) for text in (None, "a green cat")
            ]
            assert torch.equal(*found) == same

    def test_prompts_of_a_file(self, tmp_path: Path) -> None:
        """One a line, numbered without the empty ones; no file, none in it, and no text are told."""
        path = tmp_path / "prompts.txt"
        path.write_text("a red square \n\n  ein Hund, größer\n")
        assert read_prompts(path) == [Prompt(0, "a red square"), Prompt(1, "ein Hund, größer")]
        path.write_text("\n \n")
        with pytest.raises(DataError, match="holds no prompt; write one a line"):
            read_prompts(path)
        path.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(DataError, match="cannot read prompts"):
            read_prompts(path)
        with pytest.raises(DataError, match="cannot read prompts"):
            read_prompts(tmp_path / "none.txt")


def test_settings_are_frozen_values(made: Made) -> None:
    """Checked also when they are changed."""
    with pytest.raises(ConfigError, match="decode_steps is 0"):
        replace(_settings(made), decode_steps=0)
