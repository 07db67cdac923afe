import json

from effjax.data import config, describe


def test_says_what_a_config_feeds(tiny, tiny_config):
  found = describe.describe(tiny_config, num_samples=2)
  json.dumps(found)
  assert found["corpus"] == tiny.facts
  assert found["batch"]["tokens"] == 8 * 24
  assert len(found["samples"]) == 2
  train = tiny.train_text().decode()
  for segments in found["samples"]:
    assert segments
    assert all(text in train for text in segments)


def test_rendered_text_holds_the_numbers(tiny, tiny_config):
  text = describe.render(describe.describe(tiny_config))
  assert tiny.facts["hash"] in text
  assert f"{tiny.facts['tokens']['train']:,} tokens" in text
  assert "bytes/token" in text
  assert "sample 3" in text
  assert max(map(len, text.splitlines())) < 500


def test_images(fashion_mnist_dir):
  images = config.DataConfig(corpus="fashion_mnist", manual_dir=str(fashion_mnist_dir))
  found = describe.describe(images)
  assert found["corpus"]["documents"] == {"train": 20, "validation": 10}
  assert found["samples"][0].startswith("image [28, 28] uint8, label ")
  assert "20 documents" in describe.render(found)
