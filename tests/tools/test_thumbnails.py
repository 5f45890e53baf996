"""Images of a manifest are found again wherever they lie."""

import pyarrow as pa
import pyarrow.parquet as pq

from runtime.files import locate
from tools.thumbnails import Album


def test_images_in_parquet_files_have_thumbnails(tmp_path):
    data = locate("embedded:corrupt/files/baseline.jpg").read_bytes()
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [{"bytes": b"", "path": "x"}, {"bytes": data, "path": "y"}]}), path)
    album = Album()
    assert album.read(str(path), "00000001") == data
    assert album.picture(str(path), "00000001", "").uri.startswith("data:image/jpeg;base64,")
    assert album.picture(str(path), "00000002", "").uri == ""
    assert album.picture(str(tmp_path / "b.parquet"), "00000001", "").uri == ""
