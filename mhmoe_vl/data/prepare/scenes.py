"""Small scenes of coloured shapes: the scene graph, how scenes are drawn at random, and how they are rendered.

One to four objects stand in distinct cells of a 4x4 grid. At 64x64 pixels a cell is one 16-pixel patch, so that a
tiny vision transformer can tell the objects apart within minutes; CLEVR (Johnson et al., 2017, arXiv:1612.06890)
and NLVR (Suhr et al., 2017) are the models for such worlds. The scene graph is the ground truth of every caption,
answer and label in :mod:`mhmoe_vl.data.prepare.scene_language`.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageDraw

from mhmoe_vl.data.files import completed
from mhmoe_vl.errors import ConfigError

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = get_args(Split)

GRID_SIZE = 4
MAX_OBJECTS = 4
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
COLORS = {
    "red": (232, 58, 52),
    "green": (62, 190, 88),
    "blue": (66, 126, 250),
    "yellow": (250, 214, 56),
    "purple": (178, 78, 226),
    "white": (246, 246, 246),
}
BACKGROUNDS = {
    "slate": (44, 50, 62),
    "moss": (46, 52, 38),
    "plum": (54, 40, 54),
    "teal": (32, 54, 56),
    "umber": (60, 48, 40),
}

# Radius and largest displacement of the centre, in cell widths: their sum stays below one half, inside the cell.
_RADIUS = {"small": 0.31, "large": 0.46}
_MAX_OFFSET = {"small": 0.05, "large": 0.02}

# Outlines in units of the radius; the circle is an ellipse.
_ARM = 0.34
_OUTLINES = {
    "square": ((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)),
    "triangle": ((0.0, -0.95), (1.0, 0.88), (-1.0, 0.88)),
    "cross": (
        *((-_ARM, -1.0), (_ARM, -1.0), (_ARM, -_ARM), (1.0, -_ARM), (1.0, _ARM), (_ARM, _ARM)),
        *((_ARM, 1.0), (-_ARM, 1.0), (-_ARM, _ARM), (-1.0, _ARM), (-1.0, -_ARM), (-_ARM, -_ARM)),
    ),
}
_SUPERSAMPLING = 4

# Half of the scenes repeat one colour or shape, otherwise "how many red objects?" would hardly ever be 3 or 4.
_THEME_SHARE = 0.5
_THEME_STRENGTH = 0.85
_NUM_OBJECTS_WEIGHTS = {True: (1, 3, 6, 12), False: (8, 6, 4, 2)}
_VAL_BUCKETS, _NUM_BUCKETS = 1, 10


@dataclass(frozen=True)
class SceneObject:
    """One object. ``row`` and ``column`` count cells from the top left; ``offset`` is (x, y) in cell widths."""

    shape: str
    color: str
    size: str
    row: int
    column: int
    offset: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Scene:
    """A background and 1 to 4 objects in reading order, each in a cell of its own."""

    objects: tuple[SceneObject, ...]
    background: str = "slate"


def sample_scenes(
    split: Split,
    num_scenes: int,
    *,
    seed: int,
    stream: str = "scenes",
    num_colors: int = len(COLORS),
) -> list[Scene]:
    """``num_scenes`` scenes, no two with the same objects in the same cells; another ``stream`` gives other scenes.

    Fewer colours are learnt sooner.

    Which split a scene may belong to is a property of its objects (a checksum), so no train scene is ever a val scene,
    whatever the seeds and numbers.
    """
    rng = random.Random(f"{seed}/{split}/{stream}")
    scenes: dict[tuple[object, ...], Scene] = {}
    while len(scenes) < num_scenes:
        scene = _sample_scene(rng, list(COLORS)[:num_colors])
        layout = tuple((o.shape, o.color, o.size, o.row, o.column) for o in scene.objects)
        is_val = zlib.crc32(repr(layout).encode()) % _NUM_BUCKETS < _VAL_BUCKETS
        if is_val == (split == "val"):
            scenes.setdefault(layout, scene)
    return list(scenes.values())


def render_scene(scene: Scene, *, image_size: int, noise_seed: tuple[int, ...]) -> Image.Image:
    """An RGB image of ``image_size`` x ``image_size`` pixels: flat shapes with smooth edges on a dark, grainy gradient.

    Raises:
        ConfigError: ``image_size`` is not a multiple of the grid size, or below 32.
    """
    if image_size < 32 or image_size % GRID_SIZE:
        raise ConfigError(f"image size {image_size} must be a multiple of {GRID_SIZE} and at least 32; use 64 or 128")
    brightness = np.linspace(1.25, 0.75, image_size, dtype=np.float32)[:, None, None]
    background_HW3 = np.broadcast_to(
        np.asarray(BACKGROUNDS[scene.background], dtype=np.float32) * brightness, (image_size, image_size, 3)
    )
    layer_HW4 = np.asarray(_draw_objects(scene, image_size), dtype=np.float32)
    opacity_HW1 = layer_HW4[..., 3:] / 255
    grain_HW1 = np.random.default_rng(noise_seed).normal(0.0, 2.0, (image_size, image_size, 1))
    pixels_HW3 = layer_HW4[..., :3] * opacity_HW1 + background_HW3 * (1 - opacity_HW1) + grain_HW1
    return Image.fromarray(np.clip(pixels_HW3.round(), 0, 255).astype(np.uint8))


def write_scene_image(scene: Scene, path: Path, *, image_size: int, noise_seed: tuple[int, ...]) -> None:
    """Render ``scene`` into the PNG file ``path``, which appears complete or not at all.

    Raises:
        ConfigError: as :func:`render_scene`.
        OutputError: the file cannot be written.
    """
    image = render_scene(scene, image_size=image_size, noise_seed=noise_seed)
    # No fsync, unlike write_atomically: for thousands of images that takes longer than drawing them.
    with completed(path) as temporary:
        # Grain hardly compresses: a higher level would cost half the time again and save 6 %.
        image.save(temporary, format="PNG", compress_level=1)


def _sample_scene(rng: random.Random, colors: Sequence[str]) -> Scene:
    has_theme = rng.random() < _THEME_SHARE
    theme = rng.choice([{"shape": rng.choice(SHAPES)}, {"color": rng.choice(colors)}]) if has_theme else {}
    (num_objects,) = rng.choices(range(1, MAX_OBJECTS + 1), weights=_NUM_OBJECTS_WEIGHTS[has_theme])
    objects = []
    for cell in sorted(rng.sample(range(GRID_SIZE**2), num_objects)):
        look = {"shape": rng.choice(SHAPES), "color": rng.choice(colors), "size": rng.choice(SIZES)}
        if rng.random() < _THEME_STRENGTH:
            look |= theme
        reach = _MAX_OFFSET[look["size"]]
        offset = (round(rng.uniform(-reach, reach), 3), round(rng.uniform(-reach, reach), 3))
        objects.append(SceneObject(**look, row=cell // GRID_SIZE, column=cell % GRID_SIZE, offset=offset))
    return Scene(tuple(objects), rng.choice(list(BACKGROUNDS)))


def _draw_objects(scene: Scene, image_size: int) -> Image.Image:
    """The objects alone, on a transparent RGBA canvas; drawn large and reduced, which smooths the edges."""
    canvas = Image.new("RGBA", (image_size * _SUPERSAMPLING,) * 2)
    draw = ImageDraw.Draw(canvas)
    cell = image_size * _SUPERSAMPLING / GRID_SIZE
    for item in scene.objects:
        x = (item.column + 0.5 + item.offset[0]) * cell
        y = (item.row + 0.5 + item.offset[1]) * cell
        radius = _RADIUS[item.size] * cell
        if item.shape == "circle":
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLORS[item.color])
        else:
            outline = [(x + radius * u, y + radius * v) for u, v in _OUTLINES[item.shape]]
            draw.polygon(outline, fill=COLORS[item.color])
    return canvas.reduce(_SUPERSAMPLING)
