"""Stylized people: their appearance, and how they are drawn from each side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import ImageDraw

T = TypeVar("T")
Color = tuple[int, int, int]
Point = tuple[float, float]

# Colors as often as they are worn: many identities share the main ones and differ in combination and detail.
BLACK, WHITE, GREY, DARK_GREY, NAVY = (28, 28, 32), (226, 226, 222), (138, 138, 140), (78, 78, 84), (36, 42, 78)
JEANS, RED, GREEN, BEIGE, BLUE = (70, 92, 132), (168, 42, 46), (60, 104, 70), (192, 170, 134), (58, 98, 176)
BROWN, YELLOW, PINK = (98, 70, 50), (208, 178, 70), (212, 150, 164)
CLOTHES = (*[BLACK, WHITE] * 3, *[GREY, NAVY, RED] * 2, DARK_GREY, BLUE, GREEN, BEIGE, YELLOW, PINK)
BOTTOMS = (*[BLACK, JEANS] * 3, NAVY, DARK_GREY, GREY, BEIGE, BROWN, WHITE)
SHOES = (*[BLACK, WHITE] * 2, GREY, BROWN, RED, BLUE)
SKINS = ((242, 208, 182), (228, 186, 152), (206, 160, 124), (160, 112, 80), (104, 72, 54))
HAIRS = ((24, 20, 20), (24, 20, 20), (62, 44, 34), (104, 72, 44), (186, 150, 96), (150, 148, 146))
TINT = 9  # standard deviation of one identity's shade of a color
PATTERNS = ("plain", "plain", "plain", "stripes", "checks", "two-tone", "logo", "patch", "print")
OPENINGS = ("plain", "plain", "open", "zip")
HAIR_STYLES = ("short", "short", "short", "long", "long", "bun", "bald", "cap")
LOWER_STYLES = ("trousers", "trousers", "trousers", "shorts", "skirt")
BAGS = ("none", "none", "backpack", "backpack", "handbag", "shoulder bag")

# The body, in body heights: v down from the top of the head, u sideways from the middle.
HEAD_V, SHOULDER_V, ELBOW_V, HAND_V, HIP_V, KNEE_V, ANKLE_V = 0.075, 0.155, 0.32, 0.46, 0.5, 0.72, 0.95
HEAD_U, SHOULDER_U, HIP_U, LEG_WIDTH, ARM_WIDTH = 0.052, 0.125, 0.09, 0.09, 0.055
PROFILE = 0.62  # depth of the body over its width
VIEWS = ("front", "left", "back", "right")  # "left": the person walks to the left and shows the left side
EYES = {"front": (-0.02, 0.02), "left": (0.03,), "right": (0.03,), "back": ()}


class Detail(NamedTuple):
    """Pattern of a garment, visible in some views: bands (top v, bottom v, left, right), u in half widths."""

    views: tuple[str, ...]
    bands: tuple[tuple[float, float, float, float], ...]


STRIPES = tuple((v, v + 0.03, -1.0, 1.0) for v in (0.2, 0.26, 0.32, 0.38, 0.44))
DETAILS = {
    "plain": Detail((), ()),
    "stripes": Detail(VIEWS, STRIPES),
    "checks": Detail(VIEWS, (*STRIPES[::2], *((SHOULDER_V, HIP_V, u, u + 0.16) for u in (-0.75, -0.1, 0.55)))),
    "two-tone": Detail(VIEWS, ((0.34, HIP_V, -1.0, 1.0),)),
    "logo": Detail(("front",), ((0.23, 0.32, -0.45, 0.45),)),
    "patch": Detail(("front", "left"), ((0.21, 0.26, 0.2, 0.65),)),
    "print": Detail(("back",), ((0.22, 0.36, -0.6, 0.6),)),
    "open": Detail(("front",), ((SHOULDER_V, HIP_V, -0.28, 0.28),)),
    "zip": Detail(("front",), ((SHOULDER_V, HIP_V, -0.05, 0.05),)),
    "straps": Detail(("front",), ((SHOULDER_V, 0.4, -0.75, -0.5), (SHOULDER_V, 0.4, 0.5, 0.75))),
}


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def shaded(color: Color, factor: float) -> Color:
    red, green, blue = (min(255, int(factor * value)) for value in color)
    return red, green, blue


def tinted(rng: np.random.Generator, colors: Sequence[Color]) -> Color:
    red, green, blue = np.clip(np.array(pick(rng, colors)) + rng.normal(0, TINT, 3), 0, 255).astype(int).tolist()
    return red, green, blue


class Person:
    """Properties of an identity that are the same in every image."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.stature = float(rng.normal(1, 0.05))  # height over the average
        self.build = float(np.clip(rng.normal(1, 0.14), 0.75, 1.4))  # width over the average
        self.skin, self.hair, self.hair_style = tinted(rng, SKINS), tinted(rng, HAIRS), pick(rng, HAIR_STYLES)
        self.top, self.long_sleeves = tinted(rng, CLOTHES), bool(rng.random() < 0.5)
        self.pattern, self.pattern_color = pick(rng, PATTERNS), tinted(rng, CLOTHES)
        self.opening, self.inner = pick(rng, OPENINGS), tinted(rng, CLOTHES)
        self.bottom, self.lower_style, self.shoes = tinted(rng, BOTTOMS), pick(rng, LOWER_STYLES), tinted(rng, SHOES)
        self.bag, self.bag_color, self.bag_side = pick(rng, BAGS), tinted(rng, CLOTHES), pick(rng, ("left", "right"))


class Pen:
    """Pen that draws in body heights on a canvas; in profile, the person looks to positive u."""

    def __init__(self, draw: ImageDraw.ImageDraw, center: float, top: float, height: float, view: str) -> None:
        self.draw, self.center, self.top, self.height, self.view = draw, center, top, height, view
        self.profile = view in ("left", "right")
        self.sign = -1 if view == "left" else 1

    def _pixel(self, point: Point) -> Point:
        return self.center + self.sign * point[0] * self.height, self.top + point[1] * self.height

    def polygon(self, color: Color, *points: Point) -> None:
        self.draw.polygon([self._pixel(point) for point in points], fill=color)

    def box(self, color: Color, left: float, top: float, right: float, bottom: float) -> None:
        self.polygon(color, (left, top), (right, top), (right, bottom), (left, bottom))

    def ellipse(self, color: Color, center: Point, half_width: float, half_height: float) -> None:
        (x, y), rx, ry = self._pixel(center), half_width * self.height, half_height * self.height
        self.draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=color)

    def path(self, color: Color, width: float, *points: Point) -> None:
        pixels = [self._pixel(point) for point in points]
        self.draw.line(pixels, fill=color, width=max(1, round(width * self.height)), joint="curve")
        for point in (points[0], points[-1]):
            self.ellipse(color, point, width / 2, width / 2)


def draw_person(pen: Pen, person: Person, rng: np.random.Generator) -> None:
    swing = float(rng.uniform(-1, 1))  # phase of the walk: the leg in front, and how far
    _draw_arm(pen, person, -1, swing)
    for side in (-1, 1):
        _draw_leg(pen, person, side, swing)
    if person.lower_style == "skirt":
        waist, hem = HIP_U * person.build, 1.3 * HIP_U * person.build
        pen.polygon(person.bottom, (-waist, HIP_V - 0.02), (waist, HIP_V - 0.02), (hem, KNEE_V), (-hem, KNEE_V))
    _draw_torso(pen, person)
    if person.bag == "backpack":
        _draw_backpack(pen, person)
    _draw_arm(pen, person, 1, swing)
    _draw_head(pen, person)
    if person.bag in ("handbag", "shoulder bag"):
        _draw_hand_luggage(pen, person)


def _draw_limb(pen: Pen, joints: Sequence[Point], width: float, skin: Color, cloth: Color, *, covered: bool) -> None:
    pen.path(skin, width * 0.8, *joints)
    pen.path(cloth, width, *(joints if covered else joints[:2]))


def _draw_leg(pen: Pen, person: Person, side: int, swing: float) -> None:
    step = side * swing
    if pen.profile:
        joints = ((0.0, HIP_V), (0.08 * step + 0.02, KNEE_V), (0.15 * step, ANKLE_V - 0.03 * abs(step)))
        toe, shoe_length = joints[-1][0] + 0.03, 0.06
    else:
        hip, lift = side * HIP_U * 0.55 * person.build, 0.04 * max(0.0, step)
        joints = ((hip, HIP_V), (hip * 1.1, KNEE_V - lift / 2), (hip * 1.2, ANKLE_V - lift))
        toe, shoe_length = joints[-1][0], 0.036
    pen.ellipse(person.shoes, (toe, joints[-1][1] + 0.025), shoe_length, 0.028)
    covered = person.lower_style == "trousers"
    _draw_limb(pen, joints, LEG_WIDTH * person.build, person.skin, person.bottom, covered=covered)


def _draw_arm(pen: Pen, person: Person, side: int, swing: float) -> None:
    reach = -side * swing  # arms swing against the legs
    if pen.profile:
        joints = ((-0.01, SHOULDER_V + 0.04), (0.05 * reach - 0.02, ELBOW_V), (0.13 * reach + 0.02, HAND_V - 0.02))
    else:
        shoulder, lift = side * (SHOULDER_U - 0.015) * person.build, 0.04 * max(0.0, reach)
        joints = ((shoulder, SHOULDER_V + 0.03), (shoulder * 1.25, ELBOW_V), (shoulder * 1.3, HAND_V - lift))
    sleeve = shaded(person.top, 0.85)  # darker, so that the arm is visible against the torso
    _draw_limb(pen, joints, ARM_WIDTH * person.build, person.skin, sleeve, covered=person.long_sleeves)
    pen.ellipse(person.skin, joints[-1], 0.022, 0.026)


def _draw_torso(pen: Pen, person: Person) -> None:
    depth = person.build * (PROFILE if pen.profile else 1)

    def draw_band(color: Color, top: float, bottom: float, left: float, right: float) -> None:
        taper = (HIP_U - SHOULDER_U) / (HIP_V - SHOULDER_V)
        wide, narrow = (depth * (SHOULDER_U + taper * (v - SHOULDER_V)) for v in (top, bottom))
        corners = (left * wide, top), (right * wide, top), (right * narrow, bottom), (left * narrow, bottom)
        pen.polygon(color, *corners)

    pen.box(person.skin, -0.03, HEAD_V, 0.03, SHOULDER_V + 0.01)  # the neck
    draw_band(person.top, SHOULDER_V, HIP_V + 0.01, -1, 1)
    details = [(person.pattern, person.pattern_color), (person.opening, person.inner)]
    if person.bag == "backpack":
        details.append(("straps", person.bag_color))
    for name, color in details:
        for band in DETAILS[name].bands if pen.view in DETAILS[name].views else ():
            draw_band(color, *band)


def _draw_backpack(pen: Pen, person: Person) -> None:
    dark = shaded(person.bag_color, 0.7)
    if pen.profile:
        back = PROFILE * SHOULDER_U * person.build
        pen.box(person.bag_color, -back - 0.09, SHOULDER_V + 0.03, -back + 0.03, 0.42)
        pen.path(dark, 0.02, (-back, SHOULDER_V + 0.03), (0, SHOULDER_V + 0.1), (-back, 0.36))
    elif pen.view == "back":
        pen.box(person.bag_color, -0.09, SHOULDER_V + 0.02, 0.09, 0.42)
        pen.box(dark, -0.065, 0.32, 0.065, 0.39)


def _draw_hand_luggage(pen: Pen, person: Person) -> None:
    """Draw a handbag below the hand or a shoulder bag at the hip; in profile the body hides that of the far side."""
    at_hip = person.bag == "shoulder bag"
    side = 1 if (person.bag_side == "left") == (pen.view == "front") else -1  # a person's left is right in the picture
    top, height, reach = (HIP_V - 0.04, 0.1, HIP_U + 0.02) if at_hip else (HAND_V + 0.02, 0.13, SHOULDER_U * 1.35)
    center = 0.0 if pen.profile else side * reach * person.build
    if at_hip:
        pen.path(person.bag_color, 0.018, (-center * 0.6, SHOULDER_V), (center, top))
    if not pen.profile or pen.view == person.bag_side:
        pen.box(person.bag_color, center - 0.06, top, center + 0.06, top + height)


def _draw_head(pen: Pen, person: Person) -> None:
    style = person.hair_style
    hair = person.bag_color if style == "cap" else person.hair
    if style == "bun":
        pen.ellipse(hair, (-0.055 if pen.profile else 0.0, 0.01), 0.028, 0.028)
    if style == "long":
        pen.box(hair, -0.062, HEAD_V - 0.02, 0.0 if pen.profile else 0.062, 0.24 if pen.view == "back" else 0.2)
    pen.ellipse(person.skin, (0, HEAD_V), HEAD_U, 0.072)
    for u in EYES[pen.view]:
        pen.ellipse(BLACK, (u, HEAD_V + 0.005), 0.008, 0.008)
    if style != "bald":
        _draw_hair(pen, hair, peak=style == "cap")


def _draw_hair(pen: Pen, color: Color, *, peak: bool) -> None:
    pen.ellipse(color, (0, HEAD_V - 0.045), HEAD_U + 0.002, 0.035)
    if pen.view == "back":
        pen.ellipse(color, (0, HEAD_V), HEAD_U + 0.004, 0.074)
        return
    if pen.profile:
        pen.ellipse(color, (-0.018, HEAD_V - 0.025), HEAD_U * 0.8, 0.055)
    if peak:
        pen.ellipse(color, (0.045 if pen.profile else 0.0, HEAD_V - 0.02), 0.05, 0.012)
