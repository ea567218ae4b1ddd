"""evaluation/comparison.py against independent computations and in a simulation."""

from __future__ import annotations

import heapq
import math

import numpy as np
import pytest
import torch

from core.nn.lpips import lpips_vgg
from core.specs import Codes, Continuous, MultiScale
from evaluation import protocols, scores
from evaluation.comparison import (
    bits_per_pixel,
    distance_difference,
    entropy_coded_bits_per_pixel,
    most_disputed,
    paired_difference,
    region,
)
from evaluation.images import Codebooks, interval_of, psnr, ssim
from tests.evaluation.conftest import SmallInception


def test_bits_per_pixel_by_hand():
    assert bits_per_pixel(Codes(256, 1, 1024, 8), 256) == 256 * 10 / 65536
    assert bits_per_pixel(Codes(256, 2, 16384, 8), 256) == 2 * 256 * 14 / 65536
    assert bits_per_pixel(MultiScale((1, 2, 4), 2, 4096, 8), 64) == 2 * (1 + 4 + 16) * 12 / 4096
    assert bits_per_pixel(Continuous((16, 16), 32), 256) == 16 * 16 * 32 * 16 / 65536


def huffman_bits(codes: list[int]) -> int:
    """Length of a message in its own Huffman code: within one bit per code of the entropy, exact for powers of two."""
    _, counts = np.unique(codes, return_counts=True)
    heap = [(int(c), i) for i, c in enumerate(counts)]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        (a, i), (b, _) = heapq.heappop(heap), heapq.heappop(heap)
        total += a + b
        heapq.heappush(heap, (a + b, i))
    return total


@pytest.mark.parametrize("scales", [None, (1, 4)])
def test_entropy_coded_bits_equal_independent_computations(scales):
    size, pictures, vocab = 8, 6, 16
    draws = np.random.default_rng(0)
    codes = torch.from_numpy((draws.random((pictures, 5, 2)) ** 3 * vocab).astype(np.int64))
    books = Codebooks(vocab, 2, scales)
    found = entropy_coded_bits_per_pixel(books.count(codes), pictures, size)
    bits, places = 0.0, [(0, 1), (1, 5)] if scales else [(0, 5)]
    for low, high in places:
        for branch in range(2):
            message = codes[:, low:high, branch].flatten().tolist()
            bits -= sum(math.log2(message.count(code) / len(message)) for code in message)
    assert found == pytest.approx(bits / pictures / size**2, rel=1e-12)
    assert found <= bits_per_pixel(Codes(5, 2, vocab, 1), size)


def test_a_real_coder_needs_that_many_bits():
    """Shares that are powers of two: Huffman's code is as short as the entropy says."""
    message = [0] * 8 + [1] * 4 + [2] * 2 + [3] * 2
    counts = Codebooks(4).count(torch.tensor(message).view(2, 8, 1))
    assert entropy_coded_bits_per_pixel(counts, 2, 4) == pytest.approx(huffman_bits(message) / 2 / 16)


def test_intervals_cover_and_pairs_tell_more():
    """Of 200 experiments about 95 % cover the truth; pictures differ much more than the two tokenizers do."""
    covered = paired_covered = seen = blind = 0
    for seed in range(200):
        draws = np.random.default_rng(seed)
        picture = draws.normal(25, 4, 80)
        a = torch.from_numpy(picture + draws.normal(0, 0.5, 80))
        b = torch.from_numpy(picture + 0.3 + draws.normal(0, 0.5, 80))
        low, high = interval_of(a, 150)
        covered += low <= 25 <= high
        found = paired_difference(b, a, 150)
        paired_covered += found.low <= 0.3 <= found.high
        seen += found.verdict == "higher"
        other = interval_of(b, 150)
        blind += other[0] > high
    assert 0.9 <= covered / 200 <= 0.98 and 0.9 <= paired_covered / 200 <= 0.98
    assert seen / 200 > 0.85 and blind == 0


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Another way than evaluation/distances.py: eigenvalues of the product, which has no symmetry."""
    first, second = np.cov(a.T), np.cov(b.T)
    roots = np.sqrt(np.linalg.eigvals(first @ second).real.clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * roots)


def measured_distance(originals: np.ndarray, rebuilt: np.ndarray, replicates: int) -> scores.Score:
    samples, real = ({"pool": torch.from_numpy(x)} for x in (rebuilt, originals))
    protocol = protocols.get("pytorch-fid", "reconstruction")
    asked = scores.Comparison(protocol, SmallInception(), samples, None, real, "reconstruction", replicates=replicates)
    return scores.fid(asked)[0]


def difference_of(first: scores.Score, second: scores.Score):
    assert first.replicates is not None and second.replicates is not None
    return distance_difference(second.value, second.replicates, first.value, first.replicates)


def test_paired_differences_of_frechet_distances():
    draws = np.random.default_rng(0)
    originals = draws.normal(size=(60, 8))
    a, b = (originals + draws.normal(0.1, size, originals.shape) for size in (0.3, 0.6))
    first, second, again = (measured_distance(originals, x, 12) for x in (a, b, a))
    found = difference_of(first, second)
    assert found.mean == pytest.approx(frechet(b, originals) - frechet(a, originals), abs=1e-9)
    rng = np.random.default_rng(0)
    rows = [rng.integers(60, size=60) for _ in range(12)]
    drawn = [frechet(b[r], originals[r]) - frechet(a[r], originals[r]) for r in rows]
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * np.std(drawn, ddof=1), rel=1e-6)
    assert (found.low + found.high) / 2 == pytest.approx(found.mean) and found.verdict == "higher"
    equal = difference_of(first, again)
    assert (equal.mean, equal.low, equal.high) == (0, 0, 0) and equal.verdict == "no difference to be seen"


def test_intervals_of_paired_distances_cover():
    """Two equally good tokenizers, whose difference is 0: about 95 of 100 experiments say so."""
    covered = 0
    for seed in range(60):
        draws = np.random.default_rng(seed)
        originals = draws.normal(size=(100, 3)) * [3, 1, 0.3]
        first, second = (
            measured_distance(originals, originals + draws.normal(0.2, 0.5, originals.shape), 20) for _ in range(2)
        )
        found = difference_of(first, second)
        covered += found.low <= 0 <= found.high
    assert 0.87 <= covered / 60 < 1, covered


def test_the_disputed_region_is_where_they_differ():
    base = torch.randint(0, 200, (3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    other = base.clone()
    other[:, 40:56, 8:24] += 50
    top, left = most_disputed([base, other])
    assert (round(top * 64), round(left * 64)) == (40, 8)
    crop = region(other, (top, left), side=32)
    assert crop.shape == (3, 32, 32) and torch.equal(crop[:, ::2, ::2], other[:, 40:56, 8:24])
    half = torch.nn.functional.avg_pool2d(base.float(), 2).to(torch.uint8)
    top, left = most_disputed([half, other])  # compared at the smaller size, shown at each one's own
    assert abs(top * 64 - 40) <= 2 and abs(left * 64 - 8) <= 2


def test_psnr_and_ssim_of_the_libraries():
    metrics = pytest.importorskip("skimage.metrics")
    image = pytest.importorskip("torchmetrics.functional.image")
    draws = torch.Generator().manual_seed(0)
    a = torch.rand(3, 3, 40, 40, generator=draws)
    b = (a + 0.1 * torch.randn(a.shape, generator=draws)).clamp(0, 1)
    theirs = [
        [
            metrics.peak_signal_noise_ratio(x, y, data_range=1),
            metrics.structural_similarity(x, y, channel_axis=0, data_range=1),
        ]
        for x, y in zip(a.double().numpy(), b.double().numpy())
    ]
    np.testing.assert_allclose(np.stack([psnr(a, b), ssim(a, b)], 1), theirs, atol=1e-6)
    of_torchmetrics = image.structural_similarity_index_measure(b, a, data_range=1.0, reduction="none")
    np.testing.assert_allclose(ssim(a, b, "ssim_torchmetrics"), of_torchmetrics, atol=1e-4)


def test_lpips_of_its_library():
    """On random VGG weights, which both then have; the linear layers are those that the library brings."""
    library = pytest.importorskip("lpips")
    theirs = library.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    ours = lpips_vgg(pretrained=False)
    slices = [getattr(theirs.net, f"slice{i}") for i in range(1, 6)]
    convolutions = [layer for part in slices for layer in part if isinstance(layer, torch.nn.Conv2d)]
    for mine, other in zip((m for m in ours.backbone if isinstance(m, torch.nn.Conv2d)), convolutions, strict=True):
        mine.load_state_dict(other.state_dict())
    for i, head in enumerate(ours.heads):
        head.weight.data.copy_(getattr(theirs, f"lin{i}").model[1].weight)
    a, b = torch.rand(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(a, b), theirs(b, a, normalize=True).flatten(), rtol=1e-4, atol=1e-7)
