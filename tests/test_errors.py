"""What no message may hold."""

import pickle

import pytest

from flows.workers import TransientError
from fmn.errors import UserError, redacted


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("MLflow at http://me:pass@word@host:5000/x: gone", "MLflow at http://host:5000/x: gone"),
        ("postgresql://me:p%40ss@db/mlflow", "postgresql://db/mlflow"),
        ("https://x-access-token:ghp_1@github.com/a/b", "https://github.com/a/b"),
        ("hf://me:hf_1@org/name: not a source", "hf://org/name: not a source"),
        (
            "https://host/f?X-Amz-Signature=abc&a=1&token=t",
            "https://host/f?X-Amz-Signature=***&a=1&token=***",
        ),
        (
            "hf://name@main and hf://org/name@v1: no such",
            "hf://name@main and hf://org/name@v1: no such",
        ),
        (
            "models:/name@champion, sqlite:////a@b/mlflow.db",
            "models:/name@champion, sqlite:////a@b/mlflow.db",
        ),
        (
            "somebody@example.org at https://example.org/@x",
            "somebody@example.org at https://example.org/@x",
        ),
    ],
)
def test_addresses_are_told_without_what_is_secret_in_them(said: str, told: str) -> None:
    assert redacted(said) == told


def test_what_the_environment_calls_a_secret_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {
        "HF_TOKEN": "hf_abcdef",
        "MLFLOW_TRACKING_PASSWORD": "correct horse",
        "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG",
        "FMN_WEBHOOK": "https://hooks.example/services/T0/B0/X",
        "PREFECT_API_KEY": "pnu_123456",
    }
    public = {
        "TOKENIZERS_PARALLELISM": "false-and-long",
        "AWS_WEB_IDENTITY_TOKEN_FILE": "/run/secret/token",
        "X_TOKEN": "1",
    }
    for name, value in (secrets | public).items():
        monkeypatch.setenv(name, value)
    told = str(UserError(f"it said {' '.join(secrets.values())}; {' '.join(public.values())}"))
    assert not [value for value in secrets.values() if value in told]
    assert all(value in told for value in public.values())


def test_errors_travel_between_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (UserError("http://a:b@c: x"), TransientError("y")):
        again = pickle.loads(pickle.dumps(error))  # noqa: S301
        assert (type(again), str(again)) == (type(error), str(error))
