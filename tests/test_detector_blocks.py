"""The transformer blocks of DSVT alone, for those who keep their own front end: the authors' inputs and output."""

import json

import pytest
import torch
from tiny import registered, run, seeded, tiny_cloud, tiny_model

import edgeattn
from edgeattn.errors import UsageError
from edgeattn.kernels._voxels import partition, voxels_of
from edgeattn.pipeline import export_model
from edgeattn.source import resolve

tiny = registered("pillar")


@pytest.fixture(scope="module")
def blocks(tiny, tmp_path_factory):
    return export_model(tiny, output=tmp_path_factory.mktemp("blocks") / "out", split="blocks")


SETS = tuple(f"set_voxel_inds_tensor_shift_{shift}" for shift in range(2))


def fewest_sets():
    """Return two points that are in different windows for either shift."""
    cloud = tiny_cloud(2)
    cloud[:, :3] = [[-6.0, -6.0, 0.0], [6.0, 6.0, 0.0]]
    return cloud


def most_voxels(module):
    """Return the points of as many voxels as fit."""
    cloud, config = tiny_cloud(2000), module.config
    voxel, _ = voxels_of(torch.from_numpy(cloud), config.low, config.size, config.stages[0].grid)
    return cloud[(voxel >= 0) & (voxel < module.capacity.voxels[0])]


def block_feeds(cloud, module, sets=(0, 0)):
    """Return the authors' inputs for a cloud: features, sets and masks per shift, embeddings per block and layer.

    The last set is repeated up to the number of `sets`, which changes nothing.
    """
    stage, low, size = module.config.stages[0], module.config.low, module.config.size
    _, coords = voxels_of(torch.from_numpy(cloud), low, size, stage.grid)
    features = torch.randn(len(coords), module.config.width, generator=torch.Generator().manual_seed(1))
    feeds, places = {"src": features}, []
    for shift in range(2):
        grid, window, moved = map(list, (stage.grid, stage.windows[shift], stage.shifts[shift]))
        inds, _, position, _ = partition(coords, grid, window, moved, stage.set_size)
        inds = torch.cat([inds, inds[:, -1:].expand(-1, max(0, sets[shift] - inds.shape[1]), -1)], 1)
        mask = torch.zeros(inds.shape, dtype=torch.bool)
        mask[..., 1:] = inds[..., 1:] == inds[..., :-1]
        places.append(position)
        feeds[SETS[shift]] = inds.int()
        feeds[f"set_voxel_masks_tensor_shift_{shift}"] = mask
    layers = module.backbone_3d.input_layer.posembed_layers[0]
    with torch.no_grad():
        rows = [torch.stack([layer(place) for layer, place in zip(each, places, strict=True)]) for each in layers]
    return {**feeds, "pos_embed_tensor": torch.stack(rows)}


def test_exported_blocks(blocks):
    """Both counts move, up to the capacity; on real sets the graph gives what the blocks of the original give."""
    capacity = tiny_model().build().capacity
    names = [[dim.name for dim in spec.dims if dim.name] for spec in blocks.inputs]
    assert names == [["voxels"], ["sets_0"], ["sets_1"], ["sets_0"], ["sets_1"], ["voxels"]]
    assert [dim.max for dim in (blocks.inputs[0].dims[0], blocks.inputs[1].dims[1])] == [800, capacity.sets[0][0]]
    measured = json.loads((blocks.path / "reports" / "export.json").read_text())["measured"]["check"]
    assert measured["scaled_err"] <= 5e-6
    module = seeded("pillar", torch.float32)
    alone = module.blocks().eval()
    clouds = [tiny_cloud(100), tiny_cloud(2000, reach=3.0), fewest_sets(), most_voxels(module)]
    sizes = []
    with edgeattn.load(blocks, backend="ort", threads=1) as session:
        for cloud in clouds:
            most = capacity.sets[0] if cloud is clouds[-1] else (0, 0)
            feeds = block_feeds(cloud, module, most)
            feeds = {spec.name: feeds[spec.name] for spec in blocks.inputs}
            with torch.no_grad():
                expected = alone(*feeds.values())
            torch.testing.assert_close(session(feeds), expected, atol=2e-5, rtol=0)
            sizes.append([feeds["src"].shape[0], *(feeds[names].shape[1] for names in SETS)])
    assert sizes[-2:] == [[2, 2, 2], [800, 96, 80]]  # both ends of the ranges


def test_blocks_are_those_of_the_detector():
    module = seeded("pillar")
    feeds, kept = block_feeds(tiny_cloud(900), module), {}
    module.vfe.register_forward_hook(lambda _, __, value: kept.update(src=value[:-1]))
    module.backbone_3d.register_forward_hook(lambda _, __, value: kept.update(out=value[0][:-1]))
    run(module, tiny_cloud(900))
    names = [spec.name for spec in module.block_inputs()]
    feeds = {**feeds, "src": kept["src"]}
    with torch.no_grad():
        found = module.blocks()(*(feeds[name] for name in names))
    torch.testing.assert_close(found, kept["out"], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("model", "options", "text"),
    [
        ("shvit_s1", dict(split="blocks"), "--split blocks: only blocks, of a model that takes point clouds"),
        ("dsvt_waymo_pillar", dict(split="head"), "--split head"),
        ("dsvt_waymo_voxel", dict(split="blocks"), "merges voxels between its blocks"),
    ],
)
def test_no_blocks_to_split_off(model, options, text):
    with pytest.raises(UsageError, match=f"EA0115.*{text}"):
        resolve(model, **options)


@pytest.mark.parametrize("options", [dict(voxels=[2]), dict(sets=[5, 1])])
def test_too_little_room_for_blocks(options):
    module = tiny_model().build()
    module.limit(**options)
    with pytest.raises(UsageError, match=r"EA0115.*--split blocks: room for \d (voxels|sets_1), at least 3 wanted"):
        module.block_inputs()
