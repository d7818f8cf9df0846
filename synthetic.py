"""Synthetic clips, for those without the data: nine people doing the ten Weizmann actions.

They are jointed figures in clothes, in front of a textured wall, 180×144 at 25 fps like the real
clips. Everything follows from the tables below, so the same frames come out every time.

Angles are in degrees from straight down, positive forward (seen from the side) or outward (from
the front); lengths are in body heights; a phase p counts cycles of the movement.
"""

from collections import namedtuple

import cv2
import numpy as np

WIDTH, HEIGHT, GROUND = (180, 144, 116)  # of a frame in pixels; the feet are at row GROUND
FPS = 25
SUPERSAMPLING = 4  # frames are rendered that much larger, then averaged down
SHOES = "1e1c1a"


# Who is in a clip, and in front of which wall: the height in pixels, the build (1 is average, more
# is broader), and colours, RGB in hexadecimal.
Person = namedtuple("Person", "name height build skin hair long_hair shirt trousers wall")

PEOPLE = (
    Person("anna", 62, 0.9, "eec8af", "783c14", True, "be1e2d", "28283c", "c4baa0"),
    Person("boris", 76, 1.25, "e1b496", "1e1914", False, "1e50aa", "3c3732", "96a0aa"),
    Person("carla", 66, 1.0, "be8c69", "191414", True, "f0c828", "323c6e", "aa968c"),
    Person("dan", 72, 0.95, "f0cdb4", "be9646", False, "288246", "19191e", "cdc8be"),
    Person("eva", 60, 1.1, "ebc3a5", "a0461e", True, "ebebf0", "96283c", "828c78"),
    Person("felix", 78, 0.85, "694632", "140f0f", False, "f0781e", "465a82", "b4afb9"),
    Person("gita", 63, 0.95, "a57350", "0f0f0f", True, "78328c", "c8beaa", "a0af96"),
    Person("hugo", 70, 1.4, "ebbea5", "828282", False, "141419", "6e5a3c", "c8af96"),
    Person("iris", 67, 0.8, "f5d7c3", "e6c86e", True, "50bed2", "1e463c", "9191a0"),
)


# A moment of a movement. arms: two (upper arm, forearm), legs: two (thigh, shin), the right or near
# limb first; the lean of the trunk; the lift of the lower foot off the ground; the way travelled.
Pose = namedtuple("Pose", "arms legs lean lift travel", defaults=(0, 0, 0))


def wave(phase):
    return np.sin(2 * np.pi * phase)


def swell(phase):
    """0 at whole phases, 1 half-way between."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * phase)


def leap(phase):
    """A jump with both feet: the depth of the crouch, progress and height of the flight (0..1)."""
    q = phase % 1
    crouch = np.sin(np.pi * q / 0.35) if q < 0.35 else max(0, np.sin(np.pi * (q - 0.85) / 0.3))
    flight = np.clip((q - 0.35) / 0.5, 0, 1)
    return crouch, flight, 4 * flight * (1 - flight)


def walk(p):
    legs = tuple((26 * s, 26 * s - 8 - 46 * max(0, c)) for s, c in stride(p))
    arms = tuple((-26 * s, -26 * s + 16) for s, _ in stride(p))
    return Pose(arms, legs, lean=2, travel=0.8 * p)


def run(p):
    legs = tuple((12 + 42 * s, 12 + 42 * s - 20 - 85 * max(0, c)) for s, c in stride(p))
    arms = tuple((-48 * s, -48 * s + 90) for s, _ in stride(p))
    return Pose(arms, legs, lean=12, lift=0.06 * abs(wave(p)), travel=1.15 * p)


def stride(p):
    """For each leg, how far forward it is and how fast it moves forward."""
    return tuple((wave(q), wave(q + 0.25)) for q in (p, p + 0.5))


def skip(p):
    up = np.sin(np.pi * (p % 1))
    bend = 50 - 40 * up
    legs = (bend / 2, -bend / 2), (35 + 20 * up, -60 + 10 * up)
    arms = (-10 + 40 * up, 50 + 40 * up), (10 - 40 * up, 60 - 20 * up)
    return Pose(arms, legs, lean=8, lift=0.11 * up, travel=0.55 * p)


def jump(p):
    crouch, flight, high = leap(p)
    thigh = 8 + 50 * crouch + 30 * high
    legs = ((thigh, thigh - 14 - 90 * crouch - 50 * high),) * 2
    swing = -60 * crouch + 110 * high
    arms = ((swing, swing + 25), (swing - 8, swing + 12))
    return Pose(arms, legs, 5 + 28 * crouch, 0.16 * high, 0.9 * (np.floor(p) + flight))


def bend(p):
    b = swell(p) ** 0.8
    legs = ((10 * b, -22 * b), (4 * b, -26 * b))
    return Pose(((4 + 20 * b, 10 + 22 * b), (-4 + 40 * b, 4 + 36 * b)), legs, lean=105 * b)


def pjump(p):
    crouch, _, high = leap(p)
    arm, thigh = 8 + 14 * crouch + 22 * high, 4 + 30 * crouch
    leg = (thigh, 2 - 30 * crouch)
    return Pose(((arm, arm - 4),) * 2, (leg, leg), lift=0.17 * high)


def side(p):
    o = swell(p)
    legs = ((2 + 26 * o, 2 + 22 * o),) * 2
    return Pose(((14 + 8 * o, 6 + 8 * o),) * 2, legs, lift=0.06 * (1 - o), travel=0.55 * p)


def jack(p):
    o = swell(p)
    arms, legs = ((12 + 140 * o, 10 + 160 * o),) * 2, ((2 + 26 * o, 2 + 24 * o),) * 2
    return Pose(arms, legs, lift=0.07 * wave(p) ** 2)


def wave1(p):
    raised = 130 + 10 * wave(p), 178 + 48 * wave(p)
    return Pose((raised, (8, 4)), ((4, 3),) * 2)


def wave2(p):
    raised = 112 + 36 * wave(p), 138 + 44 * wave(p)
    return Pose((raised, raised), ((4, 3),) * 2)


# The movement, cycles per second, and whether it is seen from the front (limbs open sideways).
MOVEMENTS = {
    "bend": (bend, 0.4, False),  # to the floor and up again
    "jack": (jack, 0.95, True),  # jumping jacks
    "jump": (jump, 1.2, False),  # forward, on both legs
    "pjump": (pjump, 1.5, True),  # in place, on both legs
    "run": (run, 1.35, False),
    "side": (side, 1.7, True),  # galloping sideways
    "skip": (skip, 1.9, False),  # forward, on one leg
    "walk": (walk, 0.95, False),
    "wave1": (wave1, 1.3, True),  # one hand
    "wave2": (wave2, 1.0, True),  # both hands
}


def render_wall(colour, seed):
    """A wall of large blocks above a pavement: (HEIGHT, WIDTH, 3) uint8."""
    rng = np.random.default_rng(seed)
    stain = cv2.resize(rng.normal(size=(9, 12)), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    grain = cv2.GaussianBlur(rng.normal(size=(HEIGHT, WIDTH)), (3, 3), 0)
    shade = 1 + 0.05 * stain + 0.06 * grain
    for row, top in enumerate(range(0, GROUND, 14)):
        for left in range(-(row % 2) * 15 + int(rng.integers(-3, 4)), WIDTH, 30):
            block = np.s_[top : top + 14, max(0, left) : max(0, left + 30)]
            shade[block] *= 1 + 0.05 * rng.normal()
            shade[top : top + 14, max(0, left) : max(0, left + 1)] *= 0.85
        shade[top] *= 0.85
    shade[GROUND - 2 :] *= 0.72
    return np.clip(shade[..., None] * rgb(colour), 0, 255).astype(np.uint8)


def draw_person(canvas, person, pose, x, front, facing):
    """Draw `person` in `pose` onto `canvas`, which is SUPERSAMPLING times as large as a frame.

    x: of the hips, in pixels of the frame; front: seen from the front, else from the side;
    facing: 1 to the right or -1 to the left.
    """
    h = person.height
    width = h * person.build

    def step(start, angle, length):
        a = np.radians(angle)
        return start + length * h * np.array([np.sin(a), np.cos(a)])

    def to_canvas(point):  # 1/16 pixels, for cv2's shift=4
        px = np.array([x + facing * point[0], point[1]])
        return tuple(int(v) for v in np.round(px * SUPERSAMPLING * 16))

    def limb(a, b, thick, colour, shade=1.0):
        ends = to_canvas(a + ground), to_canvas(b + ground)
        thickness = max(1, round(thick * width * SUPERSAMPLING))
        cv2.line(canvas, *ends, rgb(colour, shade), thickness, cv2.LINE_AA, shift=4)

    def blob(centre, radius, colour):
        centre, radius = to_canvas(centre + ground), round(radius * h * SUPERSAMPLING * 16)
        cv2.circle(canvas, centre, radius, rgb(colour), -1, cv2.LINE_AA, shift=4)

    # The joints, with the hips at the origin; `ground` moves the lower foot to height `lift`.
    sides = (1, -1) if front else (1, 1)
    spread = 1 if front else 0.15
    hip = np.zeros(2)
    neck = step(hip, 180 - pose.lean, 0.32)
    shoulders = [neck + [s * 0.10 * width * spread, 0.02 * h] for s in (1, -1)]
    hips = [hip + [s * 0.05 * width * spread, 0] for s in (1, -1)]
    knees = [step(j, s * leg[0], 0.245) for j, s, leg in zip(hips, sides, pose.legs)]
    ankles = [step(j, s * leg[1], 0.235) for j, s, leg in zip(knees, sides, pose.legs)]
    elbows = [step(j, s * arm[0], 0.165) for j, s, arm in zip(shoulders, sides, pose.arms)]
    hands = [step(j, s * arm[1], 0.17) for j, s, arm in zip(elbows, sides, pose.arms)]
    ground = np.array([0, GROUND - pose.lift * h - max(ankle[1] for ankle in ankles)])

    def draw_leg(i, shade=1.0):
        limb(hips[i], knees[i], 0.10, person.trousers, shade)
        limb(knees[i], ankles[i], 0.08, person.trousers, shade)
        toe = [0.05 * h * (sides[i] * 0.5 if front else 1), 0.015 * h]
        limb(ankles[i], ankles[i] + toe, 0.06, SHOES)

    def draw_arm(i, shade=1.0):
        limb(shoulders[i], elbows[i], 0.075, person.shirt, shade)
        limb(elbows[i], hands[i], 0.055, person.skin, shade)

    # Draw from the back to the front. Seen from the side, the far limbs lie in shade.
    far = 1.0 if front else 0.7
    if not front:
        draw_arm(1, far)
    draw_leg(1, far)
    draw_leg(0)
    for s in np.linspace(-1, 1, 5):  # the trunk, in five strokes from the shoulders to the hips
        across = np.array([s * 0.07 * width * spread, 0])
        stroke = 0.10 if front else 0.15
        limb(neck + [0, 0.03 * h] + across, hip + 0.7 * across, stroke, person.shirt, 0.9)
    head = step(neck, 180 - pose.lean, 0.115)
    limb(neck, head, 0.06, person.skin)
    blob(head, 0.075, person.hair)
    if person.long_hair:
        blob(step(head, (0 if front else -50) - pose.lean, 0.07), 0.07, person.hair)
    blob(step(head, (0 if front else 65) - pose.lean, 0.022), 0.058, person.skin)
    draw_arm(0)
    if front:
        draw_arm(1)


def rgb(colour, shade=1.0):
    """Three numbers for a colour in hexadecimal."""
    return tuple(int(c * shade) for c in bytes.fromhex(colour))


def render_clip(person, action):
    """Yield the frames of `person` doing `action`: (144, 180, 3) uint8, RGB, at 25 fps."""
    movement, pace, front = MOVEMENTS[action]
    who = PEOPLE.index(person)
    cycles = pace * (0.9 + 0.03 * (who * 4 % 9)) / FPS  # per frame; everyone has a tempo
    speed = movement(1).travel * cycles * person.height  # pixels per frame
    n = int(np.clip(140 / speed, 36, 80)) if speed else 60 + 2 * who
    facing = 1 if (who + list(MOVEMENTS).index(action)) % 2 else -1
    poses = [movement(0.11 * who + t * cycles) for t in range(n)]
    wall = cv2.resize(render_wall(person.wall, who), None, fx=SUPERSAMPLING, fy=SUPERSAMPLING)
    for pose in poses:  # the person is in the middle of the frame at the middle of the clip
        x = WIDTH / 2 + facing * (pose.travel - poses[n // 2].travel) * person.height
        canvas = wall.copy()
        draw_person(canvas, person, pose, x, front, facing)
        yield cv2.resize(canvas, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
