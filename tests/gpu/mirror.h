// Matrices that tests of CUDA kernels keep on the host and on the device.
#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "kernels/access.h"
#include "kernels/bf16.h"
#include "kernels/matrix.h"

namespace uly::kernels {

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::kBf16 ? 2 : dtype == Dtype::kF32 ? 4 : 8; }

inline void must(cudaError_t error) { ASSERT_EQ(error, cudaSuccess) << cudaGetErrorString(error); }

// Device memory.
class Memory {
 public:
  explicit Memory(int64_t bytes) {
    if (cudaMalloc(&data_, static_cast<size_t>(bytes + 64)) != cudaSuccess) data_ = nullptr;
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { cudaFree(data_); }
  char* at(int64_t byte = 0) const { return static_cast<char*>(data_) + byte; }

 private:
  void* data_ = nullptr;
};

// The same matrix on the host, h(), and on the device, d(), from which `shift` elements are missing at the start.
class Mirror {
 public:
  Mirror(int64_t rows, int64_t columns, Dtype dtype, int64_t gap = 0, unsigned seed = 0, double scale = 1, int64_t shift = 0)
      : host_(static_cast<size_t>((rows * (columns + gap) + shift) * size_of(dtype))), device_(std::make_unique<Memory>(static_cast<int64_t>(host_.size()))) {
    const int64_t offset = shift * size_of(dtype);
    h_ = {.data = host_.data() + offset, .dtype = dtype, .rows = rows, .columns = columns, .stride = columns + gap};
    d_ = h_;
    d_.data = device_->at(offset);
    std::mt19937 engine(seed);
    std::normal_distribution<double> normal(0, scale);
    if (seed != 0)
      for (int64_t i = 0; i < rows * (columns + gap); ++i) set(i, normal(engine));
    upload();
  }
  Matrix h() const { return h_; }
  Matrix d() const { return d_; }
  void set(int64_t element, double x) {
    if (h_.dtype == Dtype::kI64)
      static_cast<int64_t*>(h_.data)[element] = static_cast<int64_t>(x);
    else if (h_.dtype == Dtype::kBf16)
      static_cast<Bf16*>(h_.data)[element] = to_bf16(static_cast<float>(x));
    else
      static_cast<float*>(h_.data)[element] = static_cast<float>(x);
  }
  void upload() { must(cudaMemcpy(device_->at(), host_.data(), host_.size(), cudaMemcpyHostToDevice)); }
  std::vector<char> download() const {
    std::vector<char> bytes(host_.size());
    must(cudaMemcpy(bytes.data(), device_->at(), bytes.size(), cudaMemcpyDeviceToHost));
    return bytes;
  }
  void expect_equal() const { EXPECT_EQ(std::memcmp(download().data(), host_.data(), host_.size()), 0); }
  // All bytes between rows equal, elements within the dtype's rounding or `tolerance` of (value + size).
  void expect_close(double tolerance = 5e-6, double size = 1) const {
    const std::vector<char> bytes = download();
    const char* got = bytes.data() + (static_cast<const char*>(h_.data) - host_.data());
    const auto value = [&](const void* p, int64_t i) {
      return static_cast<double>(h_.dtype == Dtype::kBf16 ? to_float(static_cast<const Bf16*>(p)[i]) : static_cast<const float*>(p)[i]);
    };
    if (h_.dtype == Dtype::kBf16) tolerance = 8e-3;
    for (int64_t i = 0; i < h_.rows * h_.stride; ++i) {
      const double want = value(h_.data, i);
      if (value(got, i) == want) continue;  // infinities too
      ASSERT_NEAR(value(got, i), want, i % h_.stride < h_.columns ? tolerance * (std::abs(want) + size) : 0)
          << "row " << i / h_.stride << " column " << i % h_.stride;
    }
  }

 private:
  std::vector<char> host_;
  std::unique_ptr<Memory> device_;
  Matrix h_, d_;
};

}  // namespace uly::kernels
