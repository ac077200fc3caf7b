"""Photographs of stylized people: cameras, backgrounds and occluders."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from reid.data.synthetic import people
from reid.data.synthetic.people import Color, Pen, Person, draw_person, pick, shaded, tinted

Size = tuple[int, int]  # width, height in pixels of the canvas

# Images: sizes in pixels, chances per image.
HEIGHTS, WIDTHS = (110, 150), (50, 75)
SUPERSAMPLING = 2  # drawn larger, then averaged: ImageDraw does not smooth edges
MAIN_VIEW = 0.5  # share of a camera's images that certainly show its preferred view; the others show any
ZOOM = (0.86, 1.0)  # a camera's height of the average person, in image heights
CROP_JITTER = 0.05  # standard deviation of the box's position and size, in body heights
CROWDED, OCCLUDED = 0.25, 0.25  # chance of a person in the background; of an occluder
GROUND_BANDS = 12  # steps of the ground's shading
MAX_OBJECTS = 4  # in a background
# Cameras: they set the difficulty. Raw pixels reach 8 to 9 % mAP, a ResNet-18 from scratch 45 to 50 % after 150 steps.
CAST = 0.09  # amplitude of the color cast, as a share of the intensity
GOLDEN_ANGLE = 2.4  # radians; spreads the casts of any number of cameras over the color circle
GAMMA, CONTRAST, BLUR, NOISE = (0.8, 1.25), (0.7, 1.1), (0.0, 1.1), (2.0, 9.0)  # one draw per camera
BRIGHTNESS, BLUR_CHANGE = (0.75, 1.2), (0.5, 1.5)  # one draw per image


class Scene(NamedTuple):
    """A family of backgrounds."""

    wall: Color
    ground: Color
    horizon: float  # border between wall and ground, in image heights from the top
    rows: int = 0  # of bricks or storeys
    rays: int = 0  # lines on the ground that run to the vanishing point
    blades: int = 0  # of grass


SCENES = (
    Scene(wall=(150, 142, 134), ground=(112, 112, 116), horizon=0.3, rows=2, rays=3),  # street
    Scene(wall=(150, 170, 190), ground=(96, 124, 70), horizon=0.22, blades=90),  # grass
    Scene(wall=(164, 110, 88), ground=(160, 152, 140), horizon=0.6, rows=14),  # brick wall
    Scene(wall=(196, 196, 188), ground=(176, 168, 156), horizon=0.35, rays=9),  # indoor floor
)


class Camera:
    """Properties of a camera that are the same in every image; any four in a row differ in view and scene."""

    def __init__(self, rng: np.random.Generator, camid: int) -> None:
        self.view, self.scene = people.VIEWS[camid % len(people.VIEWS)], SCENES[camid % len(SCENES)]
        hue = GOLDEN_ANGLE * camid + rng.uniform(-0.3, 0.3)
        self.gains = 1 + CAST * np.cos(hue + np.arange(3) * 2 * math.pi / 3)  # red, green, blue
        self.gamma, self.contrast = float(rng.uniform(*GAMMA)), float(rng.uniform(*CONTRAST))
        self.blur, self.noise = float(rng.uniform(*BLUR)), float(rng.uniform(*NOISE))
        self.zoom = float(rng.uniform(*ZOOM))


def _draw_scene(draw: ImageDraw.ImageDraw, size: Size, scene: Scene, rng: np.random.Generator) -> None:
    width, height = size
    horizon = height * (scene.horizon + rng.normal(0, 0.05))
    wall, ground = tinted(rng, [scene.wall]), tinted(rng, [scene.ground])
    draw.rectangle((0, 0, width, horizon), fill=wall)
    for band in range(GROUND_BANDS):  # the ground grows brighter towards the camera
        nearness = band / GROUND_BANDS
        shade = shaded(ground, 0.75 + 0.35 * nearness)
        draw.rectangle((0, horizon + (height - horizon) * nearness, width, height), fill=shade)
    for row in range(scene.rows):
        y = horizon * (row + 1) / (scene.rows + 1)
        draw.line((0, y, width, y), fill=shaded(wall, 0.75), width=2)
    vanishing = width * rng.uniform(-0.5, 1.5)
    for foot in rng.uniform(-1.5, 2.5, scene.rays) * width:
        draw.line((vanishing, horizon, foot, height), fill=shaded(ground, 0.7), width=3)
    for u, v in rng.random((scene.blades, 2)).tolist():
        x, y = u * width, horizon + v * (height - horizon)
        draw.line((x, y, x + 3, y - 4 - 8 * v), fill=shaded(ground, 0.7 + 0.5 * u), width=2)
    for _ in range(int(rng.integers(MAX_OBJECTS + 1))):
        x, y = rng.uniform(-0.2, 1.0) * width, rng.uniform(0, 0.8) * height
        corners = (x, y, x + rng.uniform(0.1, 0.5) * width, y + rng.uniform(0.05, 0.4) * height)
        pick(rng, (draw.rectangle, draw.ellipse))(corners, fill=tinted(rng, people.CLOTHES))


def _draw_vehicle(draw: ImageDraw.ImageDraw, size: Size, rng: np.random.Generator, *, car: bool) -> None:
    """Draw the hood of a car or a bicycle in front of the legs."""
    width, height = size
    color, left, top = tinted(rng, people.CLOTHES), rng.uniform(-0.6, 0.5) * width, rng.uniform(0.65, 0.85) * height
    right, radius = left + 1.1 * width, 0.09 * height
    if car:
        glass = (left + 0.1 * width, top + 0.02 * height, right - 0.1 * width, top + 0.06 * height)
        draw.rounded_rectangle((left, top, right, height), radius, fill=color)
        draw.rectangle(glass, fill=shaded(color, 0.6))
        return
    hub = height - 1.2 * radius
    for x in (left + radius, right - radius):
        draw.ellipse((x - radius, hub - radius, x + radius, hub + radius), outline=people.BLACK, width=4)
    draw.line((left + radius, hub, left + 3 * radius, top, right - radius, hub), fill=color, width=5)


def _draw_occluder(draw: ImageDraw.ImageDraw, size: Size, rng: np.random.Generator) -> None:
    width, height = size
    kind = pick(rng, ("passer-by", "pole", "car", "bicycle"))
    if kind == "passer-by":
        center = width * pick(rng, (rng.uniform(-0.1, 0.15), rng.uniform(0.85, 1.1)))
        pen = Pen(draw, center, height * rng.uniform(0.1, 0.3), height * 0.95, pick(rng, people.VIEWS))
        draw_person(pen, Person(rng), rng)
    elif kind == "pole":
        left, right = np.cumsum([rng.uniform(0.05, 0.9), rng.uniform(0.06, 0.16)]) * width
        draw.rectangle((left, 0, right, height), fill=tinted(rng, (people.GREY, people.DARK_GREY, people.BROWN)))
    else:
        _draw_vehicle(draw, size, rng, car=kind == "car")


def _develop(photo: Image.Image, camera: Camera, rng: np.random.Generator) -> Image.Image:
    """Apply lens, sensor and light: blur, gamma, contrast, color cast, brightness, noise."""
    photo = photo.filter(ImageFilter.GaussianBlur(camera.blur * rng.uniform(*BLUR_CHANGE)))
    tones = (np.linspace(0, 1, 256) ** camera.gamma - 0.5) * camera.contrast + 0.5  # [256]
    curves = 255 * np.outer(camera.gains * rng.uniform(*BRIGHTNESS), tones)  # [3, 256]
    exposed = photo.point(np.clip(curves, 0, 255).astype(np.uint8).ravel().tolist())
    pixels = np.asarray(exposed, dtype=np.float32)
    pixels = pixels + camera.noise * rng.standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def photograph(camera: Camera, person: Person | None, rng: np.random.Generator, *, zoom: float = 1.0) -> Image.Image:
    """Return one detection by `camera`: of `person`, enlarged by `zoom`, or of the background."""
    width, height = (SUPERSAMPLING * int(rng.integers(low, high + 1)) for low, high in (WIDTHS, HEIGHTS))
    canvas = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(canvas)
    _draw_scene(draw, (width, height), camera.scene, rng)
    if rng.random() < CROWDED:
        far = Pen(draw, width * rng.random(), height * rng.uniform(0.05, 0.2), height * 0.55, pick(rng, people.VIEWS))
        draw_person(far, Person(rng), rng)
    if person is not None:
        view = camera.view if rng.random() < MAIN_VIEW else pick(rng, people.VIEWS)
        shift_x, shift_y, growth = rng.normal(0, CROP_JITTER, 3)
        tall = height * camera.zoom * person.stature * (1 + growth) * zoom
        pen = Pen(draw, width / 2 + tall * shift_x, (height - tall) / 2 + tall * shift_y, tall, view)
        draw_person(pen, person, rng)
    if rng.random() < OCCLUDED:
        _draw_occluder(draw, (width, height), rng)
    return _develop(canvas.reduce(SUPERSAMPLING), camera, rng)
