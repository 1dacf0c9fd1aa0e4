"""What a run's identity says of a GPU, and the budget that cuts its sites."""

from types import SimpleNamespace

import pytest
import torch

from onecard.core.device import card_identity, site_budget


def test_a_card_is_known_by_all_that_its_bytes_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another memory cuts sites otherwise, and another driver or library may compute otherwise."""
    facts = {"name": "H100", "major": 9, "minor": 0, "total_memory": 85_000_000_000}

    def identity(**changed: object) -> dict[str, str]:
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**(facts | changed)))
        return card_identity(torch.device("cuda:0"))

    monkeypatch.setattr("onecard.core.device._driver", lambda: "550.54.15")
    plain = identity()
    assert plain["NVIDIA driver"] == "550.54.15"
    assert all(plain.values())
    for change in ({"name": "H200"}, {"minor": 1}, {"total_memory": 84_000_000_000}):
        assert identity(**change) != plain
    assert site_budget(torch.device("cuda:0")) == 25_200_000_000  # the last change's
    assert card_identity(torch.device("cpu")) == {}
