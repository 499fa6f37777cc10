"""Capacities from sample clouds: what is proposed holds every one of them, and the user's own numbers go first."""

import io

import numpy as np
import pytest
import torch
from tiny import registered, tiny_cloud, tiny_model

from edgeattn.capacity import Capacities, profile
from edgeattn.clouds import count_needs, seeded_cloud
from edgeattn.errors import UsageError
from edgeattn.model import MODELS
from edgeattn.pipeline import export_model
from edgeattn.progress import Progress
from edgeattn.weights import seed_weights

tiny, tiny_voxel = registered("pillar"), registered("voxel")
COUNTS = (0, 1, 500, 1500, 900)


@pytest.fixture(scope="module")
def clouds(tmp_path_factory):
    """Return a folder of seeded and of evenly spread clouds, in every format and a subfolder, and the clouds."""
    folder = tmp_path_factory.mktemp("clouds")
    (folder / "more").mkdir()
    space = tiny_model().inputs[0].cloud.space
    made = [seeded_cloud(seed, count, space) for seed, count in enumerate(COUNTS)]
    made += [tiny_cloud(count, 7) for count in (200, 700)]
    for number, cloud in enumerate(made):
        place = folder / ("more" if number % 2 else ".") / f"{number}"
        if number % 3 == 0:
            cloud.tofile(place.with_suffix(".bin"))
        elif number % 3 == 1:
            np.save(place.with_suffix(".npy"), cloud)
        else:
            np.savez(place.with_suffix(".npz"), points=cloud)
    return folder, made


def quiet():
    return Progress(enabled=False)


@pytest.mark.parametrize("kind", ["pillar", "voxel"])
def test_proposal_holds_every_cloud(clouds, kind):
    """As the host counts, and as the deploy form of exactly these sizes does."""
    folder, made = clouds
    model = tiny_model(kind)
    found = profile(model, folder, quiet())
    module = model.build().eval()
    seed_weights(module)
    stages = len(module.capacity.voxels)
    assert (len(found.voxels), len(found.sets)) == (stages, 2)
    module.limit(found.points, found.voxels, found.sets)
    deployed = module.deploy().eval()
    limits = [*found.voxels, *(found.sets * stages)]
    for cloud in made:
        rows = np.zeros((found.points, 5), np.float32)
        rows[: len(cloud)] = cloud
        with torch.no_grad():
            counts = deployed(torch.from_numpy(rows), torch.tensor([len(cloud)], dtype=torch.int32))[3].tolist()
        assert all(count <= limit for count, limit in zip(counts, limits, strict=True))
        assert all(counts[:1]) == bool(len(cloud))


def test_proposal_is_the_largest_with_a_fifth_on_top(clouds):
    folder, made = clouds
    found = profile(tiny_model(), folder, quiet())
    needs = [count_needs(cloud, tiny_model().inputs[0].cloud.space) for cloud in made]
    proposed = zip(
        ("points", "voxels_0", "sets_0_0", "sets_0_1"), (found.points, *found.voxels, *found.sets), strict=True
    )
    for name, given in proposed:
        wanted = 1.2 * max(need[name] for need in needs)
        assert wanted <= given < wanted + 64
        assert given % 64 == 0


def test_figures_are_told(clouds):
    folder, made = clouds
    stream = io.StringIO()
    profile(tiny_model("voxel"), folder, Progress(stream=stream))
    lines = [line.split() for line in stream.getvalue().splitlines()]
    table = {line[0]: line[1:] for line in lines if line and line[0].startswith(("points", "voxels_", "sets_"))}
    assert list(table) == [
        "points", "voxels_0", "sets_0_0", "sets_0_1", "voxels_1", "sets_1_0", "sets_1_1",
    ]  # fmt: skip
    sizes = sorted(len(cloud) for cloud in made)
    assert table["points"][:4] == [str(sizes[len(sizes) // 2]), *[str(sizes[-1])] * 3]
    assert all(row[-1] == "0.0%" for row in table.values())


def test_share_of_clouds_over_what_was_given(clouds):
    """With sizes of the user's own the table tells how many clouds do not fit them."""
    folder, made = clouds
    stream = io.StringIO()
    most = sorted(len(cloud) for cloud in made)[-2]
    found = profile(tiny_model(), folder, Progress(stream=stream), Capacities(points=most))
    row = next(line for line in stream.getvalue().splitlines() if line.lstrip().startswith("points"))
    assert found.points == most
    assert row.split()[-2:] == [str(most), f"{1 / len(made):.1%}"]


def test_export_takes_the_proposal_and_the_users_numbers_first(clouds, tiny, tmp_path):
    folder, _ = clouds
    proposed = profile(MODELS.get(tiny), folder, quiet())
    options = dict(output=tmp_path / "out", profile_from=folder, dry_run=True)
    entry = export_model(tiny, **options)["inputs"][0]
    assert entry["dims"] == [{"size": proposed.points}, {"size": 5}]
    assert entry["cloud"]["voxels"] == list(proposed.voxels)
    assert entry["cloud"]["sets"] == [list(proposed.sets)]
    entry = export_model(tiny, max_voxels=[123], max_sets=[45], **options)["inputs"][0]
    assert entry["dims"][0] == {"size": proposed.points}
    assert (entry["cloud"]["voxels"], entry["cloud"]["sets"]) == ([123], [[45, 45]])


def test_sizes_given_and_not():
    assert not Capacities()
    assert Capacities(points=5)
    assert Capacities(sets=(3,))
    given, other = Capacities(voxels=(7,)), Capacities(1, (2, 3), (4, 5))
    assert given.over(other) == Capacities(1, (7,), (4, 5))
    assert Capacities().over(other) == other


def test_what_cannot_be_profiled(tmp_path):
    with pytest.raises(UsageError, match=r"EA0140.*no point clouds in it"):
        profile(tiny_model(), tmp_path, quiet())
    (tmp_path / "broken.npy").write_bytes(b"no array")
    with pytest.raises(UsageError, match=r"EA0146.*broken.npy"):
        profile(tiny_model(), tmp_path, quiet())
    with pytest.raises(UsageError, match=r"EA0115.*shvit_s1 takes no point clouds"):
        profile(MODELS.get("shvit_s1"), tmp_path, quiet())
