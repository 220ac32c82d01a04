"""The memory of batches."""

import threading

import torch

from sadm_fast.data.batch import ImageMemory


def test_memory_is_used_again_when_its_tensor_is_gone() -> None:
    memory = ImageMemory()
    first = memory.take(2, 3)
    address = first.data_ptr()
    del first
    again = memory.take(2, 3)
    assert again.data_ptr() == address
    assert again.shape == (2, 3) and again.dtype == torch.float32


def test_memory_that_anything_still_refers_to_is_left_alone() -> None:
    memory = ImageMemory()
    whole = memory.take(4, 2)
    row, array = whole.fill_(1.0)[1], whole.numpy()
    del whole
    for held in (row, array):
        memory.take(4, 2).fill_(2.0)
        assert held.tolist() == (torch.ones(4, 2) if held is array else torch.ones(2)).tolist()
    del row
    memory.take(4, 2).fill_(3.0)
    assert array.max() == 1.0


def test_memory_that_a_graph_saved_is_left_alone_until_backward() -> None:
    memory, scale = ImageMemory(), torch.ones(3, requires_grad=True)
    loss = (memory.take(3).fill_(5.0) * scale).sum()
    memory.take(3).fill_(7.0)
    loss.backward()
    assert scale.grad is not None and scale.grad.tolist() == [5.0] * 3


def test_memory_of_another_size_is_not_mistaken() -> None:
    memory = ImageMemory()
    memory.take(4, 4)
    assert memory.take(5, 5).fill_(1.0).sum() == 25
    assert memory.take(2).shape == (2,)


def test_batches_piled_up_are_not_all_kept() -> None:
    memory = ImageMemory()
    pile = [memory.take(8) for _ in range(20)]
    pile.clear()
    assert len(memory._free) == ImageMemory._KEPT


def test_memory_comes_back_from_another_thread() -> None:
    memory = ImageMemory()
    held = [memory.take(8)]
    address = held[0].data_ptr()
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert memory.take(8).data_ptr() == address
