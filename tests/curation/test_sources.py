"""Names of sources: given, or taken from the path."""

import pytest

from curation.sources import Source, parse_source, parse_sources
from runtime.errors import UserError


@pytest.mark.parametrize(
    ("entry", "name", "path"),
    [
        ("/data/web", "web", "/data/web"),
        ("/data/web/", "web", "/data/web/"),
        ("/data/web.v2", "web", "/data/web.v2"),
        ("/data/scans-1.tar", "scans-1", "/data/scans-1.tar"),
        ("/data/scans.tar.gz", "scans", "/data/scans.tar.gz"),
        ("/data/laion/*.tar", "laion", "/data/laion/*.tar"),
        ("/data/laion.v1/0*/x.parquet", "laion.v1", "/data/laion.v1/0*/x.parquet"),
        ("embedded:pool", "pool", "embedded:pool"),
        ("web=/data/other", "web", "/data/other"),
        ("my scans=rel/ative", "my scans", "rel/ative"),
        ("q=embedded:pool", "q", "embedded:pool"),
        ("a=b=c", "a", "b=c"),
        ("/data/date=2020", "date=2020", "/data/date=2020"),
        ("./date=2020", "date=2020", "./date=2020"),
    ],
)
def test_names(entry, name, path):
    assert parse_source(entry) == Source(name, path)


def test_here_is_called_as_its_folder(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    monkeypatch.chdir(tmp_path / "pictures")
    assert parse_source(".").name == "pictures"
    assert parse_source("*.jpg").name == "pictures"
    assert parse_source("..").name == tmp_path.name


def test_two_paths_of_one_name_are_an_error_that_says_how_to_name_them():
    with pytest.raises(
        UserError, match=r"source\.paths: /a/images and /b/images are both called 'images'\n.*images-1="
    ):
        parse_sources("source.paths", ["/a/images", "/b/images"])
    with pytest.raises(UserError, match="both called 'x'"):
        parse_sources("source.paths", ["x=/a", "x=/b"])
    assert parse_sources("source.paths", ["x=/a", "/b/y", "x=/a"]) == [Source("x", "/a"), Source("y", "/b/y")]
