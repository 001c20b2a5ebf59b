#include "models/known.h"

#include <string_view>

namespace uly::models {
namespace {

constexpr const char* kLlama31 = R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-05,
  "max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
  "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}, "bos_token_id": 128000, "eos_token_id": 128001})";
constexpr const char* kLlama32 = R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-05,
  "max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
  "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}, "bos_token_id": 128000, "eos_token_id": 128001})";
constexpr const char* kQwen25 = R"({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-06,
  "max_position_embeddings": 32768, "rope_theta": 1000000.0, "use_sliding_window": false, "bos_token_id": 151643, "eos_token_id": 151645})";
constexpr const char* kQwen3 = R"({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "rms_norm_eps": 1e-06,
  "max_position_embeddings": 40960, "rope_theta": 1000000, "use_sliding_window": false, "bos_token_id": 151643, "eos_token_id": 151645})";
constexpr const char* kMistral1 = R"({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "rms_norm_eps": 1e-05,
  "max_position_embeddings": 32768, "rope_theta": 10000.0, "sliding_window": 4096, "bos_token_id": 1, "eos_token_id": 2})";
constexpr const char* kMistral2 = R"({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "rms_norm_eps": 1e-05,
  "max_position_embeddings": 32768, "rope_theta": 1000000.0, "sliding_window": null, "bos_token_id": 1, "eos_token_id": 2})";
constexpr const char* kTinyRandom = R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-06,
  "max_position_embeddings": 2048, "rope_theta": 10000.0, "bos_token_id": 0, "eos_token_id": 1})";

bool names_it(std::string_view names, const std::string& repository) {
  while (!names.empty()) {
    const size_t end = names.find(' ');
    if (names.substr(0, end) == repository) return true;
    names = end == std::string_view::npos ? "" : names.substr(end + 1);
  }
  return false;
}

}  // namespace

const std::vector<Known>& known() {
  // clang-format off
  static const std::vector<Known> kKnown = {
    // names                                                        generation     D      F   N   K    H       V   L  tied
    {"meta-llama/Llama-3.1-8B meta-llama/Llama-3.1-8B-Instruct"
     " meta-llama/Meta-Llama-3.1-8B meta-llama/Meta-Llama-3.1-8B-Instruct", kLlama31, 4096, 14336, 32,  8, 128, 128256, 32, false},
    {"meta-llama/Llama-3.1-70B meta-llama/Llama-3.1-70B-Instruct"
     " meta-llama/Meta-Llama-3.1-70B meta-llama/Meta-Llama-3.1-70B-Instruct"
     " meta-llama/Llama-3.3-70B-Instruct",                            kLlama31, 8192, 28672, 64,  8, 128, 128256, 80, false},
    {"meta-llama/Llama-3.2-1B meta-llama/Llama-3.2-1B-Instruct",      kLlama32, 2048,  8192, 32,  8,  64, 128256, 16, true},
    {"meta-llama/Llama-3.2-3B meta-llama/Llama-3.2-3B-Instruct",      kLlama32, 3072,  8192, 24,  8, 128, 128256, 28, true},
    {"Qwen/Qwen2.5-0.5B-Instruct",                                    kQwen25,   896,  4864, 14,  2,  64, 151936, 24, true},
    {"Qwen/Qwen2.5-1.5B-Instruct",                                    kQwen25,  1536,  8960, 12,  2, 128, 151936, 28, true},
    {"Qwen/Qwen2.5-3B-Instruct",                                      kQwen25,  2048, 11008, 16,  2, 128, 151936, 36, true},
    {"Qwen/Qwen2.5-7B-Instruct",                                      kQwen25,  3584, 18944, 28,  4, 128, 152064, 28, false},
    {"Qwen/Qwen2.5-14B-Instruct",                                     kQwen25,  5120, 13824, 40,  8, 128, 152064, 48, false},
    {"Qwen/Qwen2.5-32B-Instruct",                                     kQwen25,  5120, 27648, 40,  8, 128, 152064, 64, false},
    {"Qwen/Qwen2.5-72B-Instruct",                                     kQwen25,  8192, 29568, 64,  8, 128, 152064, 80, false},
    {"Qwen/Qwen3-0.6B",                                               kQwen3,   1024,  3072, 16,  8, 128, 151936, 28, true},
    {"Qwen/Qwen3-1.7B",                                               kQwen3,   2048,  6144, 16,  8, 128, 151936, 28, true},
    {"Qwen/Qwen3-4B",                                                 kQwen3,   2560,  9728, 32,  8, 128, 151936, 36, true},
    {"Qwen/Qwen3-8B",                                                 kQwen3,   4096, 12288, 32,  8, 128, 151936, 36, false},
    {"Qwen/Qwen3-14B",                                                kQwen3,   5120, 17408, 40,  8, 128, 151936, 40, false},
    {"Qwen/Qwen3-32B",                                                kQwen3,   5120, 25600, 64,  8, 128, 151936, 64, false},
    {"mistralai/Mistral-7B-v0.1 mistralai/Mistral-7B-Instruct-v0.1",  kMistral1, 4096, 14336, 32,  8, 128,  32000, 32, false},
    {"mistralai/Mistral-7B-Instruct-v0.2",                            kMistral2, 4096, 14336, 32,  8, 128,  32000, 32, false},
    {"mistralai/Mistral-7B-v0.3 mistralai/Mistral-7B-Instruct-v0.3",  kMistral2, 4096, 14336, 32,  8, 128,  32768, 32, false},
    {"hf-internal-testing/tiny-random-LlamaForCausalLM",              kTinyRandom, 16,    64,  4,  4,   4,  32000,  2, false},
  };
  // clang-format on
  return kKnown;
}

std::optional<Json> known_config(const std::string& repository) {
  for (const Known& row : known()) {
    if (!names_it(row.names, repository)) continue;
    Json config = Json::parse(row.generation);
    config.update({{"hidden_size", row.D}, {"intermediate_size", row.F}, {"num_attention_heads", row.N}, {"num_key_value_heads", row.K},
                   {"head_dim", row.H}, {"vocab_size", row.V}, {"num_hidden_layers", row.L}, {"tie_word_embeddings", row.tied}});
    return config;
  }
  return std::nullopt;
}

}  // namespace uly::models
