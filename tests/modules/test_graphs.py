"""Replayed networks, by a stand-in for what PyTorch records on a GPU; `tests/models/test_gpu.py` has the real thing."""

import copy
import pickle

import pytest
import torch

from ldm.modules.graphs import Recorder, call, forget
from ldm.util import UserError


class Recorded(torch.Tensor):
    """A tensor that says it is on a GPU."""

    @property
    def is_cuda(self):
        return True


def on_gpu(*values):
    return [value.as_subclass(Recorded) for value in values]


@pytest.fixture
def records(monkeypatch):
    """The inputs of each record; the passes before one are run, as by PyTorch."""
    found = []

    def make(function, samples, allow_unused_input, **_):
        for _ in range(3):
            function(*samples)
        found.append(samples)
        return lambda *given: function(*given)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make)
    without_gpu(monkeypatch)
    return found


def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)


def network():
    torch.manual_seed(0)
    made = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    made.recorder = Recorder()
    return made


def test_what_comes_again_is_recorded_and_computes_the_same(records):
    replayed, plain = network(), network()
    plain.recorder = None
    for count in (4, 4, 2, 4, 2, 3, 3):
        x = torch.randn(count, 3, 6, 6)
        outputs = [call(replayed, *on_gpu(x)), call(plain, x)]
        for model, output in zip((replayed, plain), outputs, strict=True):
            model.zero_grad()
            output.square().sum().backward()
        torch.testing.assert_close(outputs[0].as_subclass(torch.Tensor), outputs[1])
        for a, b in zip(replayed.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad.as_subclass(torch.Tensor), b.grad)
    for a, b in zip(replayed.buffers(), plain.buffers(), strict=True):  # the passes before a record do not count
        torch.testing.assert_close(a, b)
    assert [samples[0].shape[0] for samples in records] == [4, 2], "3 would be the third"


def test_a_record_keeps_no_node_of_the_weights(records):
    """They would accumulate gradients on the stream of the record."""
    model = network()
    for _ in range(2):
        call(model, *on_gpu(torch.randn(4, 3, 6, 6)))
    given = records[0][1:]
    for weight, alias in zip(model.parameters(), given, strict=True):
        assert alias is not weight and alias.data_ptr() == weight.data_ptr() and alias.requires_grad


def test_what_does_not_train_is_not_recorded(records):
    model, x = network(), on_gpu(torch.randn(4, 3, 6, 6))
    for _ in range(3):
        call(model, torch.randn(4, 3, 6, 6))  # on a CPU
        with torch.no_grad():
            call(model, *x)
    model.eval()
    for _ in range(3):
        call(model, *x)
    assert not records


def test_what_cannot_be_recorded_ends_with_what_to_do(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fails)
    without_gpu(monkeypatch)
    model, x = network(), torch.randn(4, 3, 6, 6)
    call(model, *on_gpu(x))
    with pytest.raises(UserError, match=r"Sequential cannot be recorded: set lightning.*cuda_graphs=false.*capturing"):
        call(model, *on_gpu(x))


def test_records_are_forgotten(records):
    """So that a second training of a model, which has been on the CPU between the two, finds its weights."""
    model = torch.nn.ModuleList([network(), torch.nn.Linear(2, 2)])
    for _ in range(2):
        call(model[0], *on_gpu(torch.randn(4, 3, 6, 6)))
    forget(model)
    assert not model[0].recorder.replays and not hasattr(model[1], "recorder")


def test_copies_start_without_records(records):
    model = network()
    for _ in range(2):
        call(model, *on_gpu(torch.randn(4, 3, 6, 6)))
    assert model.recorder.replays
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(copied.recorder, Recorder) and not copied.recorder.replays
    assert list(model.state_dict()) == list(network().state_dict())
