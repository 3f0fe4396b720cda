"""Pages grow with a sequence, are shared by samples, and are copied before two of them would write in one."""

from __future__ import annotations

import pytest
import torch

from lamella_engine.kv_cache import PAGE_TOKENS, KVCache, PageCopy, PageTable

CPU = torch.device("cpu")


def fill(cache: KVCache, table: PageTable, first: int, last: int, value: float) -> None:
    """Store `value` at the positions `first` to `last` (exclusive) in two layers of different shapes."""
    slots = table.slots[first:last]
    with torch.inference_mode():
        cache.store(0, slots, torch.full((last - first, 2, 4), value), torch.full((last - first, 2, 3), -value))
        cache.store(1, slots, torch.full((last - first, 1, 8), value), torch.full((last - first, 1, 8), -value))


def read(cache: KVCache, table: PageTable, last: int) -> list[float]:
    """What is stored at the first `last` positions, the same in all layers, keys and values."""
    keys, values = cache.load(0, table.slots[:last])
    found: list[float] = keys[:, 0, 0].tolist()
    assert (keys == keys[:, :1, :1]).all()
    assert (values == -keys[:, :, :3]).all()
    keys, values = cache.load(1, table.slots[:last])
    assert keys[:, 0, 7].tolist() == found
    assert (values == -keys).all()
    return found


def open_table(cache: KVCache, tokens: int) -> PageTable:
    table = cache.open_table(tokens)
    assert table is not None
    return table


def test_slots_of_two_tables_never_overlap() -> None:
    cache = KVCache(1000, CPU)

    first, second = open_table(cache, 100), open_table(cache, 50)

    assert len(first.slots) == 112
    assert not set(first.slots.tolist()) & set(second.slots.tolist())


def test_a_pool_that_is_short_gives_nothing_and_takes_nothing() -> None:
    cache = KVCache(64, CPU)
    table = open_table(cache, 33)

    assert cache.open_table(17) is None
    assert cache.grow(table, 33, 65) is None
    assert cache.free_tokens == 16
    assert len(table.pages) == 3


def test_growing_keeps_the_slots_there_were() -> None:
    cache = KVCache(4096, CPU)
    table, other = open_table(cache, 5), open_table(cache, 5)
    before = table.slots.tolist()

    for end in range(6, 400):
        assert cache.grow(table, end - 1, end) == []
        assert cache.grow(other, end - 1, end) == []

    assert table.slots.tolist()[:16] == before
    assert len(set(table.slots.tolist()) | set(other.slots.tolist())) == 2 * 400


def test_the_last_shared_page_is_copied_before_it_is_written() -> None:
    cache = KVCache(256, CPU)
    first = open_table(cache, 20)
    fill(cache, first, 0, 20, 1.0)

    second, third = cache.share(first, 20), cache.share(first, 20)
    assert cache.free_pages == 14
    for index, table in enumerate((first, second, third)):
        copies = cache.grow(table, 20, 21)
        assert copies is not None
        cache.copy_pages(copies)
        fill(cache, table, 20, 21, 10.0 + index)

    assert cache.free_pages == 12
    for index, table in enumerate((first, second, third)):
        assert read(cache, table, 21) == [1.0] * 20 + [10.0 + index]
    assert first.pages[0] == second.pages[0] == third.pages[0]


def test_a_full_shared_page_is_never_copied() -> None:
    cache = KVCache(256, CPU)
    first = open_table(cache, 32)

    second = cache.share(first, 32)

    assert cache.grow(first, 32, 33) == []
    assert cache.grow(second, 32, 33) == []
    assert first.pages[:2] == second.pages[:2]
    assert first.pages[2] != second.pages[2]


def test_copies_of_one_boundary_read_before_any_writes() -> None:
    cache = KVCache(64, CPU)
    tables = [open_table(cache, 16) for _ in range(4)]
    for index, table in enumerate(tables):
        fill(cache, table, 0, 16, float(index))
    page = [table.pages[0] for table in tables]

    cache.copy_pages([PageCopy(page[0], page[1]), PageCopy(page[1], page[2]), PageCopy(page[3], page[0])])

    assert [read(cache, table, 16)[0] for table in tables] == [3.0, 0.0, 1.0, 3.0]


def test_a_shared_page_is_free_when_its_last_holder_lets_go() -> None:
    cache = KVCache(128, CPU)
    first = open_table(cache, 40)
    second = cache.share(first, 40)

    cache.release(first)
    assert cache.free_pages == 5
    cache.release(second)
    cache.release(second)

    assert cache.free_pages == 8
    assert sorted(open_table(cache, 128).pages) == list(range(8))


def test_no_copy_is_made_for_the_only_holder_left() -> None:
    cache = KVCache(128, CPU)
    first = open_table(cache, 20)
    second = cache.share(first, 20)
    cache.release(first)

    assert cache.grow(second, 20, 21) == []
    assert cache.free_pages == 6


@pytest.mark.parametrize("capacity", [16, 100, 1000])
def test_the_tensors_never_take_more_than_the_capacity(capacity: int) -> None:
    cache = KVCache(capacity, CPU)
    table = open_table(cache, capacity // PAGE_TOKENS * PAGE_TOKENS)

    fill(cache, table, 0, 10, 1.0)
    fill(cache, table, 10, 16, 1.0)

    bytes_per_token = 4 * (2 * 4 + 2 * 3 + 8 + 8)
    assert cache.nbytes == capacity // PAGE_TOKENS * PAGE_TOKENS * bytes_per_token


def test_the_slot_that_pads_batches_holds_numbers_from_the_start() -> None:
    cache = KVCache(64, CPU)
    open_table(cache, 16)
    table = open_table(cache, 16)

    cache.store(0, table.slots[:1], torch.ones(1, 1, 4), torch.ones(1, 1, 4))

    assert cache.load(0, torch.tensor([0]))[0].tolist() == [[[0.0] * 4]]
