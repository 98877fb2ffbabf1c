"""The gate of --reject-copies: what it rejects, that it changes nothing else, and that jobs with it resume."""

import numpy as np
import pandas as pd
import pytest

from gbci_fast.cli import main
from gbci_fast.data.vindr import VinDr, find_inputs
from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.lesions import CROP_SIZE, Crops
from gbci_fast.evaluate.memorisation.evaluation import read_synthetic
from gbci_fast.evaluate.memorisation.neighbors import FARTHEST, TrainingIndex, index_digest, save_index
from gbci_fast.generate import workers
from gbci_fast.generate.copies import CopyError, CopyGate
from gbci_fast.generate.job import run_job
from gbci_fast.generate.plan import make_plan
from gbci_fast.generate.settings import JobSettings, SamplerSettings
from gbci_fast.generate.synthesizer import Made, Synthesizer

QUICK = SamplerSettings(num_inference_steps=1, guidance_scale=1.0)


def gate_of(crops, names, threshold, image_ids=None):
    index = TrainingIndex.of(crops, names, image_ids or names)
    return CopyGate(index=index, threshold=threshold, digest=index_digest(index, threshold))


def noise(count=3):
    rng = np.random.default_rng(0)
    shape = (count, CROP_SIZE, CROP_SIZE)
    return Crops(
        pixels=rng.uniform(0.2, 0.8, shape).astype(np.float32),
        masks=np.ones(shape, bool),
        patients=tuple(map(str, range(count))),
    )


@pytest.fixture(scope="module")
def plan(phantom):
    return make_plan(find_inputs(phantom), variants=1, seed=0)


@pytest.fixture(scope="module")
def painted(pipe, plan):
    """The crops that a job over the phantom paints, one per item, caught at a gate that lets all pass."""
    caught = []

    class Watch(CopyGate):
        def check(self, item, template, mask, painted):
            original = TrainingIndex.nearest

            def nearest(index, crop, excluded):
                caught.append(crop)
                return original(index, crop, excluded)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(TrainingIndex, "nearest", nearest)
                super().check(item, template, mask, painted)

    empty = gate_of(noise(), ["a", "b", "c"], 0.0)
    watch = Watch(index=empty.index, threshold=0.0, digest="")
    synthesizer = Synthesizer(pipe, QUICK, watch, threads=1)  # one thread, so that images come in order
    list(synthesizer.stream([plan[:2], plan[2:4]], lambda synthesis: None))
    return caught


def mirrored(crops):
    return Crops(pixels=crops.pixels[:, ::-1], masks=crops.masks[:, ::-1], patients=crops.patients)


@pytest.fixture
def job(pipe, plan):
    def run(output, gate=None, **options):
        digest = gate.digest if gate else ""
        settings = JobSettings(seed=0, batch_size=2, sampler=QUICK, weights_hash="ab" * 32, copies_hash=digest)
        return run_job(pipe, plan, output, settings, gate=gate, **options)

    return run


@pytest.fixture
def planted(painted):
    """A gate that knows the third image's lesion, upside down."""
    return gate_of(mirrored(painted[2]), ["set/planted-1"], 0.05, ["planted"])


class TestJobs:
    def test_a_planted_copy_is_rejected_and_all_others_keep_their_bytes(
        self, images_of, job, plan, planted, finished, tmp_path
    ):
        result = job(tmp_path / "data", planted)
        assert (result.images, result.skipped, result.rejected) == (3, 1, 1)
        kept, whole = images_of(tmp_path / "data"), images_of(finished)
        assert set(whole) - set(kept) == {name for name in whole if plan[2].image_id in name}
        assert kept.items() <= whole.items()
        assert pd.read_parquet(tmp_path / "data" / "manifest.parquet")["index"].tolist() == [0, 1, 3]
        (row,) = pd.read_csv(tmp_path / "data" / "skipped.csv").itertuples()
        assert row.file.endswith(f"{plan[2].template.image_id}.dicom")
        assert row.reason.startswith("near copy of training lesion set/planted-1: distance 0.0")
        assert row.reason.endswith(f"threshold 0.0500, image {plan[2].image_id}")

    def test_a_gate_without_copies_rejects_none(self, images_of, job, finished, tmp_path):
        result = job(tmp_path / "data", gate_of(noise(), ["a", "b", "c"], 0.05))
        assert (result.images, result.skipped, result.rejected) == (4, 0, 0)
        assert images_of(tmp_path / "data") == images_of(finished)
        assert not (tmp_path / "data" / "skipped.csv").exists()

    def test_interrupted_and_resumed(self, job, planted, tree, tmp_path):
        job(tmp_path / "whole", planted)

        def stop(images):
            if images == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            job(tmp_path / "cut", planted, on_batch=stop)
        for other in (None, gate_of(planted_crops(planted), ["set/planted-1"], 0.06)):
            with pytest.raises(GBCIError, match="holds another job: other copies_hash"):
                job(tmp_path / "cut", other, resume=True)
        job(tmp_path / "cut", planted, resume=True)
        assert tree(tmp_path / "cut") == tree(tmp_path / "whole")
        again = job(tmp_path / "cut", planted, resume=True)  # finished: as it is
        assert (again.images, again.rejected) == (3, 1)

    def test_where_all_are_rejected_nothing_stays(self, job, tmp_path):
        sentence = "all 4 images were skipped, so nothing was made; the first reason: .*: near copy of training lesion"
        with pytest.raises(GBCIError, match=sentence):
            job(tmp_path / "data", gate_of(noise(), ["a", "b", "c"], FARTHEST))
        assert not (tmp_path / "data").exists()

    def test_other_errors_still_stop_a_job_with_a_gate(self, job, planted, tmp_path, monkeypatch):
        def fail(template, image, mask):
            raise GBCIError("cannot be pasted")

        monkeypatch.setattr(workers, "paste", fail)
        with pytest.raises(GBCIError, match="cannot be pasted"):
            job(tmp_path / "data", planted)


def planted_crops(gate):
    details = np.repeat(np.repeat(gate.index.details.astype(np.float32), 2, 1), 2, 2)
    return Crops(pixels=0.5 + 0.05 * details, masks=np.ones(details.shape, bool), patients=("p",))


class TestGate:
    def test_the_templates_own_lesions_do_not_count(self, pipe, plan, painted):
        own = plan[2].template.image_id
        crops = Crops(
            pixels=np.concatenate([painted[2].pixels, noise().pixels]),
            masks=np.ones((4, CROP_SIZE, CROP_SIZE), bool),
            patients=tuple("abcd"),
        )
        for ids, rejected in (([own, "b", "c", "d"], False), (["a", "b", "c", "d"], True), ([own] * 4, False)):
            gate = gate_of(crops, list("abcd"), 0.05, ids)
            (made,) = Synthesizer(pipe, QUICK, gate).stream([plan[2:4]], lambda synthesis: synthesis.item.index)
            assert isinstance(made[0], CopyError) is rejected
            assert [image.value for image in made if isinstance(image, Made)] == ([3] if rejected else [2, 3])

    def test_sees_nearly_what_the_evaluation_sees_in_the_output(self, painted, finished):
        """The data set is read back from native pixels, and its mask is grown anew."""
        found = read_synthetic(finished)
        index = TrainingIndex.of(found.crops, found.names, found.names)
        order = [record.image_id for record in VinDr(finished).images]
        for i, crop in enumerate(painted):
            nearest = index.nearest(crop, [None])
            assert found.names[nearest.rows[0]].split("/")[1] == f"{order[i]}-1"
            assert nearest.distances[0] < 0.35


class TestCommand:
    @pytest.fixture
    def weights(self, pipe, tmp_path):
        pipe.save_pretrained(tmp_path / "weights")
        return tmp_path / "weights"

    def generate(self, phantom, output, weights, index, *options):
        quick = ("--variants", "1", "--steps", "1", "--guidance", "1", "--batch-size", "2", "--runtime", "eager")
        arguments = [phantom, "--output", output, "--weights", weights, *quick, "--tier", "exact", *options]
        return main(["generate", *map(str, arguments), "--reject-copies", str(index)])

    def test_says_how_many_were_rejected(self, phantom, weights, planted, tmp_path, capfd):
        save_index(planted.index, planted.threshold, tmp_path / "index.npz")
        assert self.generate(phantom, tmp_path / "data", weights, tmp_path / "index.npz") == 0
        out = capfd.readouterr().out
        assert out.startswith("3 synthetic images in")
        assert f"skipped 1 of 4 (1 near copies of training lesions), see {tmp_path / 'data' / 'skipped.csv'}" in out
        manifest = pd.read_parquet(tmp_path / "data" / "manifest.parquet")
        assert set(manifest.copies_hash) == {planted.digest}
        save_index(gate_of(noise(), ["a", "b", "c"], 0.1).index, 0.1, tmp_path / "none.npz")
        assert self.generate(phantom, tmp_path / "clean", weights, tmp_path / "none.npz") == 0
        assert "no near copy of a training lesion among 4" in capfd.readouterr().out

    @pytest.mark.parametrize(("content", "sentence"), [(None, "does not exist"), (b"no index", "cannot be read (")])
    def test_a_bad_index_is_one_sentence_before_anything_is_sampled(
        self, phantom, tmp_path, capfd, monkeypatch, content, sentence
    ):
        monkeypatch.setattr("gbci_fast.model.checkpoint.load_pipeline", None)
        if content is not None:
            (tmp_path / "index.npz").write_bytes(content)
        assert self.generate(phantom, tmp_path / "data", tmp_path, tmp_path / "index.npz") == 1
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(f"gbci-fast generate: {tmp_path / 'index.npz'} {sentence}")
        assert not (tmp_path / "data").exists()
