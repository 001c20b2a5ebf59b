// Runs whole trainings of tiny models in this process, a thread a rank, and reads back their losses and gradients.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace uly::parity {

struct Shape {
  std::string family = "llama";
  int64_t D = 32, F = 48, N = 4, K = 2, H = 8, V = 97, L = 2;
  bool tied = false;
};

struct Training {
  Shape shape;
  int64_t W = 1, P = 1, accumulation = 1, micro_batch = 1, steps = 2, div_length = 1;
  std::vector<int64_t> lengths = {37, 5, 64, 1, 50, 23, 41, 16};
  int64_t node = 1;       // ranks that share a second copy of the weights
  std::string extra;      // more lines of the recipe
  std::vector<std::string> overrides;
  bool distinct = false;  // every token of the file has an id of its own, from 1 on
  int64_t changed = -1;   // a token of the file that has another id
  std::vector<int64_t> trained_documents;  // all tokens of these alone are trained; none: a pattern
  bool evaluates = false; // on the same documents, after every step
  std::string dtype = "fp32", wire = "fp32";  // of the model; of gradients between ranks
  std::string config = "{}";  // more of the model's config.json
};

struct Result {
  std::vector<double> losses;                                      // a step
  std::vector<double> eval_losses;                                 // an evaluation
  std::vector<std::map<std::string, std::vector<float>>> gradients;  // a step, by name
};

Result train(const Training& run);

// memory.device with which a plan may use so many bytes for buffers: beside what the process takes, and with what stays free.
int64_t device_bytes_for(const Training& run, int64_t bytes);

// Largest difference between gradients of the same name, relative to the norm (at least 1e-3 of the largest norm).
double gradient_difference(const Result& a, const Result& b);

}  // namespace uly::parity
