"""Ray casting of the built-in rooms: buffers of weights, which a matrix product with the colours turns into images.

The lighting makes every pixel linear in the colours of floor, wall and object: an image is
`weights @ [floor, wall, object, white]`. One buffer per (shape, scale, orientation) serves all colours.
"""

import numpy as np

SHAPES = ("cube", "cylinder", "sphere", "capsule")

ROOM = 4.6  # half the side of the square room; the object stands in the middle of the floor, at z = 0
CAMERA_DISTANCE, CAMERA_HEIGHT, TARGET_HEIGHT = 4.2, 2.3, 0.85
FIELD_OF_VIEW = 46.0  # degrees, across the picture
_LIGHT = np.array([-0.20, -0.62, 0.76])
LIGHT = _LIGHT / np.linalg.norm(_LIGHT)  # towards the light; fixed to the room
MISS = np.inf


def camera_rays(orientation: float, size: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """The rays of a camera that looks past the object into a corner of the room.

    Args:
        orientation: angle of the camera around the object, degrees; 0 looks straight into the corner.
        size: width and height of the picture, pixels.
        samples: rays per pixel and direction.

    Returns:
        Origin (3,) and unit directions ((size*samples)², 3), row by row from the top left.
    """
    angle = np.deg2rad(225.0 + orientation)
    origin = np.array([CAMERA_DISTANCE * np.cos(angle), CAMERA_DISTANCE * np.sin(angle), CAMERA_HEIGHT])
    forward = np.array([0.0, 0.0, TARGET_HEIGHT]) - origin
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    up = np.cross(right, forward)
    n = size * samples
    screen = ((np.arange(n) + 0.5) / n * 2 - 1) * np.tan(np.deg2rad(FIELD_OF_VIEW / 2))
    x, y = np.meshgrid(screen, -screen)
    rays = forward + x[..., None] * right + y[..., None] * up
    rays = rays.reshape(-1, 3)
    return origin, rays / np.linalg.norm(rays, axis=1, keepdims=True)


def _sphere(origin: np.ndarray, rays: np.ndarray, centre: np.ndarray, radius: float) -> np.ndarray:
    """First distance (m,) along unit rays (m, 3) to a sphere, or infinity."""
    offset = origin - centre
    b = (rays * offset).sum(-1)
    discriminant = b * b - (offset * offset).sum(-1) + radius * radius
    t = -b - np.sqrt(np.maximum(discriminant, 0))
    return np.where((discriminant > 0) & (t > 0), t, MISS)


def _cube(origin: np.ndarray, rays: np.ndarray, half: float) -> np.ndarray:
    """First distance (m,) to an upright cube of half side `half` that stands on the floor, or infinity."""
    with np.errstate(divide="ignore", invalid="ignore"):
        low = (np.array([-half, -half, 0]) - origin) / rays
        high = (np.array([half, half, 2 * half]) - origin) / rays
    near, far = np.minimum(low, high).max(-1), np.maximum(low, high).min(-1)
    return np.where((near <= far) & (near > 0), near, MISS)


def _tube(origin: np.ndarray, rays: np.ndarray, radius: float, bottom: float, top: float) -> np.ndarray:
    """First distance (m,) to the side of an upright cylinder between two heights, or infinity."""
    a = (rays[:, :2] ** 2).sum(-1)
    b = (rays[:, :2] * origin[..., :2]).sum(-1)
    discriminant = b * b - a * ((origin[..., :2] ** 2).sum(-1) - radius * radius)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = (-b - np.sqrt(np.maximum(discriminant, 0))) / a
    z = origin[..., 2] + np.where(np.isfinite(t), t, 0) * rays[:, 2]
    return np.where((discriminant > 0) & (t > 0) & (z >= bottom) & (z <= top), t, MISS)


def _disc(origin: np.ndarray, rays: np.ndarray, radius: float, height: float) -> np.ndarray:
    """First distance (m,) to a level disc around the z axis, or infinity."""
    with np.errstate(divide="ignore", invalid="ignore"):
        t = (height - origin[..., 2]) / rays[:, 2]
    point = origin[..., :2] + np.where(np.isfinite(t), t, 0)[:, None] * rays[:, :2]
    return np.where((t > 0) & np.isfinite(t) & ((point**2).sum(-1) <= radius * radius), t, MISS)


# Radius (half side of the cube) and height of each shape at scale 1.
DIMENSIONS = {"cube": (0.62, 1.24), "cylinder": (0.62, 1.3), "sphere": (0.75, 1.5), "capsule": (0.5, 1.75)}
# Larger, and chosen so that at one scale the top edges of all shapes, each averaged over the object's columns, lie at
# most 1.3 pixels of 32 apart; a round top has to be higher for that. With `DIMENSIONS` they lie 1.8 to 4 apart.
LEVEL = {"cube": (0.75, 1.5), "cylinder": (0.74, 1.57), "sphere": (0.88, 1.76), "capsule": (0.7, 1.78)}


def _dimensions(shape: str, scale: float, level: bool) -> tuple[float, float]:
    """Radius and height of a shape at a scale."""
    radius, height = (LEVEL if level else DIMENSIONS)[shape]
    return radius * scale, height * scale


def hit_object(shape: str, scale: float, origin: np.ndarray, rays: np.ndarray, level: bool = False) -> np.ndarray:
    """Distance (m,) from `origin` (3,) or (m, 3) along unit `rays` (m, 3) to the object; infinity for a miss."""
    radius, height = _dimensions(shape, scale, level)
    if shape == "cube":
        return _cube(origin, rays, radius)
    if shape == "sphere":
        return _sphere(origin, rays, np.array([0, 0, radius]), radius)
    if shape == "cylinder":
        return np.minimum(_tube(origin, rays, radius, 0, height), _disc(origin, rays, radius, height))
    caps = [_sphere(origin, rays, np.array([0, 0, z]), radius) for z in (radius, height - radius)]
    return np.minimum(_tube(origin, rays, radius, radius, height - radius), np.minimum(*caps))


def object_normals(shape: str, scale: float, points: np.ndarray, level: bool = False) -> np.ndarray:
    """Outward unit normals (m, 3) at points (m, 3) of the object's surface."""
    radius, height = _dimensions(shape, scale, level)
    if shape == "cube":
        local = points - [0, 0, radius]
        axis = np.abs(local).argmax(-1)
        normals = np.zeros_like(points)
        rows = np.arange(len(points))
        normals[rows, axis] = np.sign(local[rows, axis])
        return normals
    if shape == "cylinder":
        side = points * [1, 1, 0] / radius
        return np.where((points[:, 2] >= height - 1e-6)[:, None], [0.0, 0.0, 1.0], side)
    axis_z = np.clip(points[:, 2], radius, height - radius)
    return (points - np.stack([0 * axis_z, 0 * axis_z, axis_z], -1)) / radius


def _shade_object(
    shape: str, scale: float, points: np.ndarray, rays: np.ndarray, level: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Diffuse weight (m,) and white highlight (m,) of object points (m, 3) seen along rays (m, 3); their sum ≤ 1."""
    normals = object_normals(shape, scale, points, level)
    facing = normals @ LIGHT
    diffuse = 0.42 + 0.5 * np.maximum(facing, 0) + 0.06 * normals[:, 2]
    mirrored = 2 * facing[:, None] * normals - LIGHT
    highlight = 0.35 * np.maximum(-(mirrored * rays).sum(-1), 0) ** 24 * (facing > 0)
    return diffuse, np.minimum(highlight, 1 - diffuse)


def geometry_buffer(
    shape: str, scale: float, orientation: float, size: int, samples: int = 3, level: bool = False
) -> np.ndarray:
    """Weights of the colours in every pixel of one scene.

    Args:
        shape: one of `SHAPES`.
        scale: size of the object, 0.75 to 1.25 in Shapes3D.
        orientation: degrees, -30 to 30 in Shapes3D.
        size: width and height in pixels.
        samples: rays per pixel and direction, averaged (antialiasing).
        level: objects of the sizes in `LEVEL` in place of `DIMENSIONS`.

    Returns:
        (size, size, 4) float32 in [0, 1]: floor, wall, object, white; the four sum to at most 1.
    """
    origin, rays = camera_rays(orientation, size, samples)
    weights = np.zeros((len(rays), 4))
    with np.errstate(divide="ignore"):
        to_floor = np.where(rays[:, 2] < 0, -origin[2] / rays[:, 2], MISS)
        to_walls = (np.sign(rays[:, :2]) * ROOM - origin[:2]) / rays[:, :2]
    to_wall, to_object = to_walls.min(-1), hit_object(shape, scale, origin, rays, level)
    seen = np.argmin([to_floor, to_wall, to_object], axis=0)

    floor = np.flatnonzero(seen == 0)
    points = origin + to_floor[floor, None] * rays[floor]
    towards = np.broadcast_to(LIGHT, points.shape)
    lit = np.isinf(hit_object(shape, scale, points + np.array([0, 0, 1e-6]), towards, level))
    distance = np.linalg.norm(points[:, :2], axis=-1)
    weights[floor, 0] = (0.95 - 0.02 * distance) * np.where(lit, 1.0, 0.62)

    wall = np.flatnonzero(seen == 1)
    height = origin[2] + to_wall[wall] * rays[wall, 2]
    weights[wall, 1] = np.where(to_walls[wall].argmin(-1) == 0, 0.78, 0.90) + 0.015 * np.minimum(height, 5)

    thing = np.flatnonzero(seen == 2)
    points = origin + to_object[thing, None] * rays[thing]
    weights[thing, 2], weights[thing, 3] = _shade_object(shape, scale, points, rays[thing], level)
    return weights.reshape(size, samples, size, samples, 4).mean((1, 3)).astype(np.float32)
