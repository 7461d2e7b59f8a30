"""ZO-AdaMU and its rivals in plain fp64 NumPy, written from the published formulas, independent of the library: what the tests
compare with.

Random words are exact (uint64 arithmetic); everything after them is fp64 with NumPy's own log, sin, cos and sqrt, so a
difference from the library beyond fp32 rounding is an error of one of the two.
"""

from dataclasses import dataclass

import numpy as np

MASK32 = np.uint64(0xFFFFFFFF)
SHIFT32 = np.uint64(32)


def philox4x32(counter, key, rounds: int = 10) -> tuple[np.ndarray, ...]:
    """Philox-4x32 (Salmon et al. 2011, section 3.3).

    ``counter``: four arrays or ints of 32 bits; ``key``: two ints. Returns four uint64 arrays.
    """
    x = [np.asarray(word, dtype=np.uint64) for word in counter]
    k0, k1 = (np.uint64(word) for word in key)
    for _ in range(rounds):
        left = x[0] * np.uint64(0xD2511F53)
        right = x[2] * np.uint64(0xCD9E8D57)
        x = [(right >> SHIFT32) ^ x[1] ^ k0, right & MASK32, (left >> SHIFT32) ^ x[3] ^ k1, left & MASK32]
        k0 = np.uint64((int(k0) + 0x9E3779B9) % 2**32)
        k1 = np.uint64((int(k1) + 0xBB67AE85) % 2**32)
    return tuple(x)


def words64(key, step: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """The two random words of each flat index start <= i < stop, as uint64."""
    index = np.arange(start, stop, dtype=np.uint64)
    pair = index >> np.uint64(1)
    zero = np.zeros_like(pair)
    x = philox4x32((pair & MASK32, pair >> SHIFT32, zero + np.uint64(step), zero), key)
    odd = (index & np.uint64(1)).astype(bool)
    return np.where(odd, x[2], x[0]), np.where(odd, x[3], x[1])


def noise64(key, step: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """(xi1, xi2) of the flat indices start <= i < stop by Box-Muller."""
    first, second = words64(key, step, start, stop)
    u = ((first >> np.uint64(8)).astype(np.float64) + 1.0) / 2.0**24
    phi = 2.0 * np.pi * (second >> np.uint64(8)).astype(np.float64) / 2.0**24
    radius = np.sqrt(-2.0 * np.log(u))
    return radius * np.cos(phi), radius * np.sin(phi)


def anneal64(t: int, t1: int, t2: int, t3: int, phi: float, floor: float = 0.01) -> float:
    """The annealed scalar of the paper's Figure 1."""
    if t < t1:
        return 1.0
    u = min(t, t2) - t1
    if u == 0:
        return 1.0
    denominator = max(t3 - phi * u * (t3 - t2) / (t2 - t1), u)
    return max(floor, 0.5 + 0.5 * np.cos(np.pi * (u / denominator)))


def direction64(m, t: int, alpha: float, beta1: float, beta2: float, key, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(m_t, v) out of m_{t-1}, for the elements with flat indices start, start + 1, ..."""
    m = np.asarray(m, dtype=np.float64)
    xi1, xi2 = noise64(key, t, start, start + m.size)
    centred = np.sqrt(alpha) * xi1
    around_m = m + np.sqrt(1.0 - alpha) * xi2
    return beta1 * centred + (1.0 - beta1) * around_m, beta2 * centred**2 + (1.0 - beta2) * around_m**2


@dataclass(frozen=True)
class Hyper64:
    """Hyper-parameters of a run. The schedule is that of Figure 1."""

    t1: int
    t2: int
    t3: int
    lr: float
    weight_decay: float = 0.0
    sigma: float = 1e-8
    phi_alpha: float = 0.1
    phi_beta1: float = 1.0
    phi_beta2: float = 1.5
    floor: float = 0.01

    def scalars(self, t: int) -> tuple[float, float, float]:
        """(alpha, beta1, beta2) of step t."""
        phis = self.phi_alpha, self.phi_beta1, self.phi_beta2
        return tuple(anneal64(t, self.t1, self.t2, self.t3, phi, self.floor) for phi in phis)


def zo_adamu_step64(theta, m, g: float, t: int, hyper: Hyper64, key, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """One step of one parameter (or a range of it): returns the new (theta, m) as fp64.

    ``m`` is m_{t-1}; ``g`` the projected gradient (L(theta + eps m_t) - L(theta - eps m_t)) / (2 eps), m_t from direction64.
    """
    theta = np.asarray(theta, dtype=np.float64)
    m_t, v = direction64(m, t, *hyper.scalars(t), key, start)
    return theta - hyper.lr * (g * m_t / np.sqrt(v + hyper.sigma) + hyper.weight_decay * theta), m_t


@dataclass(frozen=True)
class Adaptive64:
    """Hyper-parameters of a run with the moments of a first-order optimizer. ``schedule``: adam, adamw, adamax or amsgrad."""

    schedule: str
    lr: float
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def step(self, state: dict, x, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(m^, the denominator) of the sequence's element x, its ``count``-th; ``state`` (begun empty) becomes this step's."""
        x = np.asarray(x, dtype=np.float64)
        state["m"] = self.beta1 * state.get("m", 0.0) + (1.0 - self.beta1) * x
        m = state["m"] / (1.0 - self.beta1**count)
        if self.schedule == "adamax":
            state["u"] = np.maximum(self.beta2 * state.get("u", 0.0), np.abs(x) + self.eps)
            return m, state["u"]
        state["v"] = self.beta2 * state.get("v", 0.0) + (1.0 - self.beta2) * x * x
        v = state["v"]
        if self.schedule == "amsgrad":
            v = state["largest"] = np.maximum(state.get("largest", 0.0), v)
        return m, np.sqrt(v / (1.0 - self.beta2**count)) + self.eps


def zo_adaptive_step64(theta, states: list[dict], grads, t: int, count: int, hyper: Adaptive64, keys, on_gradient: bool):
    """theta (fp64, flat indices from 0) after step t with these projected gradients, one a key; ``count``: the steps, with
    this one, whose gradient the moments took. ``states``: one dictionary a key, or one on the gradient, changed."""
    theta = np.asarray(theta, dtype=np.float64)
    noises = [noise64(key, t, 0, theta.size)[0] for key in keys]
    l2, decoupled = (0.0, hyper.weight_decay) if hyper.schedule == "adamw" else (hyper.weight_decay, 0.0)
    if on_gradient:
        gradient = sum(g * xi for g, xi in zip(grads, noises, strict=True)) / len(keys)
        m, denominator = hyper.step(states[0], gradient + l2 * theta, count)
        change = m / denominator
    else:
        change = np.zeros_like(theta)
        for state, g, xi in zip(states, grads, noises, strict=True):
            m, denominator = hyper.step(state, xi, t)
            change += (g * m + l2 * theta) / denominator / len(keys)
    return theta - hyper.lr * (change + decoupled * theta)


def zo_adamu_gradient_step64(theta, m, g: float, t: int, hyper: Hyper64, key) -> tuple[np.ndarray, np.ndarray]:
    """One step of ZO-AdaMU's formulas with the gradient g xi1 in the place of the noise, alpha = 1: the new (theta, m)."""
    theta, m = np.asarray(theta, dtype=np.float64), np.asarray(m, dtype=np.float64)
    _, beta1, beta2 = hyper.scalars(t)
    gradient = g * noise64(key, t, 0, theta.size)[0]
    new, v = beta1 * gradient + (1.0 - beta1) * m, beta2 * gradient**2 + (1.0 - beta2) * m**2
    return theta - hyper.lr * (new / np.sqrt(v + hyper.sigma) + hyper.weight_decay * theta), new
