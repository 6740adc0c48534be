import torch
from torch import nn

from onnx_lathe.converter.batches import draw, draw_moves, moved


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_moved_images_are_translations_that_repeat_the_edge() -> None:
    originals = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5).repeat(20, 1, 1, 1)
    changed = moved(originals, draw_moves(40, 2, seeded()))
    assert changed.is_contiguous(memory_format=torch.channels_last)
    seen: set[tuple[int, int]] = set()
    for before, after in zip(originals, changed, strict=True):
        padded = nn.functional.pad(before, (2, 2, 2, 2), mode="replicate")
        matches = {
            (row, column)
            for row in range(5)
            for column in range(5)
            if torch.equal(padded[:, row : row + 4, column : column + 5], after)
        }
        assert len(matches) == 1
        seen |= matches
    assert {row for row, _ in seen} == {column for _, column in seen} == set(range(5))
    assert torch.equal(moved(originals, torch.zeros(40, 2, dtype=torch.int64)), originals)


def test_batches_hold_every_sample_once_in_nearly_equal_numbers_of_one_shape() -> None:
    groups = [((torch.zeros(count, 2),), torch.zeros(count)) for count in (10, 1)]
    batches = draw(groups, 4, seeded())
    assert sorted((group, len(indices)) for group, indices in batches) == [(0, 3), (0, 3), (0, 4), (1, 1)]
    assert sorted(int(index) for group, indices in batches for index in indices if group == 0) == list(range(10))
    again = draw(groups, 4, seeded())
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(batches, again, strict=True))
