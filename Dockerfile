# syntax=docker/dockerfile:1
# Image for GPU machines: the CUDA runtime, torch's CUDA wheels, FlashAttention built for them; apex on request.
#   docker build -t regen-dist .                        # docs/gpu.md: how to run it under Pyxis/Enroot and Apptainer
#   docker build -t regen-dist --build-arg APEX=1 .     # with NVIDIA apex, for optimizer.kind=fused_adam
# The code itself is not in it: jobs bring their own copy. Not built by this project's CI.
ARG CUDA=12.8.1
ARG UBUNTU=ubuntu24.04

# Wheels that must be compiled, by an nvcc of torch's own CUDA minor version.
FROM nvidia/cuda:${CUDA}-devel-${UBUNTU} AS build
ARG TORCH="torch>=2.10,<3"
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu128
ARG FLASH_ATTN="flash-attn>=2.7,<3"
ARG APEX=0
ARG APEX_COMMIT=master
ENV DEBIAN_FRONTEND=noninteractive TORCH_CUDA_ARCH_LIST="8.0;9.0" FLASH_ATTN_CUDA_ARCHS="80;90" MAX_JOBS=4
RUN apt-get update && apt-get install -y --no-install-recommends git g++ ninja-build python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/regen
ENV PATH=/opt/regen/bin:$PATH
RUN pip install --no-cache-dir "${TORCH}" --index-url ${TORCH_INDEX}
RUN pip install --no-cache-dir "setuptools>=77" wheel packaging ninja psutil numpy
RUN pip install --no-cache-dir --no-build-isolation "${FLASH_ATTN}"
RUN if [ "${APEX}" = 1 ]; then git clone https://github.com/NVIDIA/apex /tmp/apex && cd /tmp/apex \
    && git checkout "${APEX_COMMIT}" && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-cache-dir --no-build-isolation . \
    && rm -rf /tmp/apex; fi
# The library's dependencies; torch stays what it is.
COPY pyproject.toml setup.py README.md LICENSE /tmp/regen/
COPY regen_dist/__init__.py /tmp/regen/regen_dist/
RUN python -c "import tomllib; p = tomllib.load(open('/tmp/regen/pyproject.toml', 'rb'))['project']; \
e = [x for n in ('video', 'data', 'text', 'eval', 'track', 'hub') for x in p['optional-dependencies'][n]]; \
print(*p['dependencies'], *(x for x in e if not x.startswith(p['name'])), sep='\n')" \
    > /tmp/requirements.txt && DS_BUILD_OPS=0 pip install --no-cache-dir -r /tmp/requirements.txt
# torch 2.10 for CUDA 12 pins a cuDNN whose 3D convolutions in bf16 are wrong. Last: pip goes back to the pinned one
# whenever it installs something that depends on torch.
ARG CUDA
RUN pip install --no-cache-dir --no-deps "nvidia-cudnn-cu${CUDA%%.*}>=9.15"

FROM nvidia/cuda:${CUDA}-runtime-${UBUNTU}
# g++ compiles DeepSpeed's CPU operator and torch.compile's launchers; python3-dev has the headers for both.
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends git g++ python3-dev \
    python3-venv && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/regen /opt/regen
ENV PATH=/opt/regen/bin:$PATH PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
WORKDIR /workspace
# With the checkout mounted there (-v "$PWD:/workspace"): safe paths leave the current folder out.
CMD ["env", "PYTHONPATH=/workspace", "python", "-m", "tools.cli", "--help"]
