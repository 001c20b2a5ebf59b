#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <set>

#include "base/check.h"
#include "models/known.h"
#include "models/spec.h"

namespace uly::models {
namespace {

namespace fs = std::filesystem;

Json tiny(const std::string& family) {
  const std::map<std::string, std::string> names = {{"llama", "Llama"}, {"qwen2", "Qwen2"}, {"qwen3", "Qwen3"}, {"mistral", "Mistral"}};
  return {{"architectures", {names.at(family) + "ForCausalLM"}},
          {"model_type", family},
          {"hidden_size", 24},
          {"intermediate_size", 40},
          {"num_hidden_layers", 2},
          {"num_attention_heads", 4},
          {"num_key_value_heads", 2},
          {"vocab_size", 11},
          {"max_position_embeddings", 64}};
}

// Returns what reading `config` complains of; "" where it is accepted.
std::string complaint(const Json& config) {
  try {
    spec_from_config(config, "config.json");
  } catch (const UserError& error) {
    return error.what();
  }
  return "";
}

TEST(ModelsTest, WellKnownModelsHaveTheirPublishedSizes) {
  const std::map<std::string, int64_t> sizes = {{"meta-llama/Llama-3.1-8B", 8'030'261'248},
                                                {"meta-llama/Llama-3.1-8B-Instruct", 8'030'261'248},
                                                {"meta-llama/Llama-3.1-70B", 70'553'706'496},
                                                {"meta-llama/Llama-3.3-70B-Instruct", 70'553'706'496},
                                                {"meta-llama/Llama-3.2-1B-Instruct", 1'235'814'400},
                                                {"meta-llama/Llama-3.2-3B", 3'212'749'824},
                                                {"Qwen/Qwen3-0.6B", 596'049'920},
                                                {"Qwen/Qwen3-1.7B", 1'720'574'976},
                                                {"Qwen/Qwen3-4B", 4'022'468'096},
                                                {"Qwen/Qwen3-8B", 8'190'735'360},
                                                {"Qwen/Qwen3-14B", 14'768'307'200},
                                                {"Qwen/Qwen3-32B", 32'762'123'264},
                                                {"Qwen/Qwen2.5-0.5B-Instruct", 494'032'768},
                                                {"Qwen/Qwen2.5-1.5B-Instruct", 1'543'714'304},
                                                {"Qwen/Qwen2.5-3B-Instruct", 3'085'938'688},
                                                {"Qwen/Qwen2.5-7B-Instruct", 7'615'616'512},
                                                {"Qwen/Qwen2.5-14B-Instruct", 14'770'033'664},
                                                {"Qwen/Qwen2.5-32B-Instruct", 32'763'876'352},
                                                {"Qwen/Qwen2.5-72B-Instruct", 72'706'203'648},
                                                {"mistralai/Mistral-7B-v0.1", 7'241'732'096},
                                                {"mistralai/Mistral-7B-Instruct-v0.3", 7'248'023'552}};
  for (const auto& [name, size] : sizes) {
    const Spec spec = find(name, "", Json::object());
    EXPECT_EQ(num_parameters(spec), size) << name;
    EXPECT_EQ(spec.name, name);
    EXPECT_EQ(spec.folder, "");
  }
  EXPECT_EQ(models::find("mistralai/Mistral-7B-v0.1", "", Json::object()).sliding_window, 4096);
  EXPECT_EQ(models::find("mistralai/Mistral-7B-v0.3", "", Json::object()).sliding_window, 0);
}

TEST(ModelsTest, FusedWeightsAreOneViewAndStartAligned) {
  for (const std::string family : {"llama", "qwen2", "qwen3", "mistral"}) {
    Json config = tiny(family);
    if (family != "qwen2" && family != "mistral") config["attention_bias"] = true;
    if (family == "llama") config["mlp_bias"] = true;
    const Spec spec = spec_from_config(config, "");
    const std::vector<Unit> all = units(spec);
    ASSERT_EQ(all.size(), 4u);
    const LayerOffsets at = layer_offsets(spec);
    for (int64_t offset : {at.norm1_D, at.qkv_OD, at.qkv_bias_O, at.q_norm_H, at.k_norm_H, at.o_DO, at.o_bias_D, at.norm2_D, at.gate_up_2FD, at.gate_up_bias_2F,
                           at.down_DF, at.down_bias_D})
      EXPECT_TRUE(offset == -1 || offset % kAlignElements == 0);
    std::map<std::string, Tensor> tensors;
    for (const Tensor& tensor : all[2].tensors) tensors[tensor.name.substr(std::string("model.layers.1.").size())] = tensor;
    EXPECT_EQ(tensors["self_attn.q_proj.weight"].offset, at.qkv_OD);
    EXPECT_EQ(tensors["self_attn.k_proj.weight"].offset, at.qkv_OD + spec.query_columns() * spec.D);
    EXPECT_EQ(tensors["self_attn.v_proj.weight"].offset, at.qkv_OD + (spec.query_columns() + spec.key_columns()) * spec.D);
    EXPECT_EQ(tensors["mlp.up_proj.weight"].offset, at.gate_up_2FD + spec.F * spec.D);
    EXPECT_EQ(at.qkv_bias_O >= 0, family != "mistral");
    EXPECT_EQ(at.o_bias_D >= 0, family == "llama" || family == "qwen3");
    EXPECT_EQ(at.q_norm_H >= 0, family == "qwen3");
    EXPECT_EQ(at.down_bias_D >= 0, family == "llama");
    for (const Unit& unit : all) {
      int64_t end = 0;
      for (const Tensor& tensor : unit.tensors) {
        EXPECT_GE(tensor.offset, end) << tensor.name;
        end = tensor.offset + tensor.elements();
        EXPECT_EQ(tensor.decays, !tensor.is_norm && !tensor.is_bias) << tensor.name;
      }
      EXPECT_EQ(unit.elements, (end + kAlignElements - 1) / kAlignElements * kAlignElements);
    }
  }
}

TEST(ModelsTest, WhatChangesTheMathematicsIsRefusedByName) {
  const std::vector<std::pair<std::string, Json>> llama = {
      {"hidden_act", "gelu"},
      {"attention_dropout", 0.1},
      {"partial_rotary_factor", 0.5},
      {"pretraining_tp", 2},
      {"quantization_config", {{"bits", 4}}},
      {"clip_qkv", 8},
      {"logit_scale", 0.06},
      {"embedding_multiplier", 12},
      {"residual_multiplier", 0.2},
      {"attention_multiplier", 0.01},
      {"final_logit_softcapping", 30.0},
      {"attn_logit_softcapping", 50.0},
      {"query_pre_attn_scalar", 256},
      {"num_key_value_heads", 3},
      {"head_dim", 7},
      {"layer_types", {"full_attention", "chunked_attention"}},
      {"layer_types", {"full_attention", "sliding_attention"}},
      {"layer_types", {"full_attention"}},
      {"hidden_size", 25},
      {"vocab_size", 0},
      {"vocab_size", "11"},
      {"rms_norm_eps", "small"},
      {"tie_word_embeddings", 1},
      {"pad_token_id", 11},
      {"rope_theta", -1},
      {"num_local_experts", 8},
      {"no_rope_layers", {1, 0}},
      {"rope_scaling", {{"rope_type", "longrope"}}},
      {"rope_scaling", {{"type", "su"}}},
      {"rope_scaling", {{"rope_type", "linear"}}},
      {"rope_scaling", {{"rope_type", "linear"}, {"factor", 2.0}, {"mrope_section", {1, 2}}}},
      {"rope_scaling", 3},
      {"rope_scaling", {{"rope_type", "linear"}, {"type", "yarn"}, {"factor", 2.0}}},
      {"rope_parameters", {{"rope_type", "default"}, {"partial_rotary_factor", 0.5}}},
      {"rope_parameters", {{"full_attention", {{"rope_type", "default"}}}}},
      {"rope_scaling", {{"rope_type", "llama3"}, {"factor", 8.0}, {"low_freq_factor", 4.0}, {"high_freq_factor", 4.0}}}};
  for (const auto& [key, value] : llama) {
    Json config = tiny("llama");
    config[key] = value;
    const std::string text = complaint(config);
    EXPECT_EQ(text.rfind("config.json: ", 0), 0u) << key << ": " << text;
    EXPECT_NE(text.find(key), std::string::npos) << key << ": " << text;
    EXPECT_NE(text.find("expected"), std::string::npos) << text;
    EXPECT_NE(text.find("found"), std::string::npos) << text;
  }
  Json mistral = tiny("mistral"), qwen = tiny("qwen3");
  mistral["attention_bias"] = true;
  EXPECT_NE(complaint(mistral).find("attention_bias"), std::string::npos);
  qwen["layer_types"] = {"sliding_attention", "full_attention"};  // without use_sliding_window
  EXPECT_NE(complaint(qwen).find("layer_types"), std::string::npos);
}

TEST(ModelsTest, NeutralAndUnknownKeysAreAccepted) {
  Json config = tiny("llama");
  config.update({{"attention_dropout", 0.0},
                 {"pretraining_tp", 1},
                 {"partial_rotary_factor", 1.0},
                 {"logit_scale", 1},
                 {"clip_qkv", nullptr},
                 {"quantization_config", nullptr},
                 {"use_cache", true},
                 {"something_new", 3},
                 {"layer_types", {"full_attention", "full_attention"}},
                 {"rope_scaling", nullptr},
                 {"hidden_act", "silu"},
                 {"torch_dtype", "bfloat16"}});
  EXPECT_EQ(complaint(config), "");
}

TEST(ModelsTest, AnUnsupportedArchitectureListsTheSupportedOnes) {
  Json config = tiny("llama");
  config["model_type"] = "gemma2";
  config["architectures"] = {"Gemma2ForCausalLM"};
  EXPECT_EQ(complaint(config),
            "config.json: architecture not supported: expected one of LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, MistralForCausalLM, found "
            "Gemma2ForCausalLM (model_type gemma2)");
  config["model_type"] = "llama";  // they disagree
  EXPECT_NE(complaint(config).find("architecture not supported"), std::string::npos);
  EXPECT_NE(complaint(Json::object()).find("neither architectures nor model_type"), std::string::npos);
  EXPECT_NE(complaint(Json::array()).find("expected a JSON object"), std::string::npos);
}

TEST(ModelsTest, SlidingWindowsAreFollowed) {
  Json config = tiny("qwen2");
  config.update({{"use_sliding_window", true}, {"sliding_window", 32}, {"max_window_layers", 1}});
  EXPECT_EQ(spec_from_config(config, "").sliding_window, 32);
  config["max_window_layers"] = 2;
  EXPECT_EQ(spec_from_config(config, "").sliding_window, 0);
  config["layer_types"] = {"full_attention", "sliding_attention"};
  EXPECT_EQ(spec_from_config(config, "").sliding_window, 32);
  config["layer_types"] = {"full_attention", "full_attention"};
  config["max_window_layers"] = 0;
  EXPECT_EQ(spec_from_config(config, "").sliding_window, 0);
  EXPECT_EQ(spec_from_config(tiny("mistral"), "").sliding_window, 4096);
}

TEST(ModelsTest, BothSpellingsOfRopeMustAgree) {
  Json config = tiny("llama");
  config["rope_theta"] = 5e5;
  config["rope_scaling"] = {{"type", "linear"}, {"factor", 2}};
  config["rope_parameters"] = {{"rope_type", "linear"}, {"factor", 2.0}, {"rope_theta", 5e5}};
  EXPECT_EQ(complaint(config), "");
  config["rope_parameters"]["factor"] = 3;
  EXPECT_NE(complaint(config).find("rope_parameters: expected the same as rope_scaling says"), std::string::npos);
}

class FindTest : public testing::Test {
 protected:
  FindTest() {
    std::string name = (fs::temp_directory_path() / "models_test.XXXXXX").string();
    folder_ = ::mkdtemp(name.data());
  }
  ~FindTest() override { fs::remove_all(folder_); }

  static void write(const fs::path& path, const std::string& text) {
    fs::create_directories(path.parent_path());
    std::ofstream(path) << text;
  }
  std::string put(const Json& config) const {
    write(folder_ / "config.json", config.dump());
    return folder_.string();
  }
  std::string failure(const std::string& name, const Json& overrides) const {
    try {
      find(name, (folder_ / "hub").string(), overrides);
    } catch (const UserError& error) {
      return error.what();
    }
    return "";
  }

  fs::path folder_;
};

TEST_F(FindTest, AFolderComesFirstThenTheCache) {
  const fs::path place = folder_ / "hub" / "models--org--name";
  write(place / "refs" / "main", "abc123\n");
  write(place / "snapshots" / "abc123" / "config.json", tiny("qwen3").dump());
  const std::string hub = (folder_ / "hub").string();
  EXPECT_EQ(cached_snapshot("org/name", hub), (place / "snapshots" / "abc123").string());
  EXPECT_EQ(cached_snapshot("org/other", hub), "");
  EXPECT_EQ(cached_snapshot("../x/y", hub), "");
  EXPECT_EQ(cached_snapshot("org/name", ""), "");
  const Spec cached = find("org/name", hub, Json::object());
  EXPECT_EQ(cached.family, "qwen3");
  EXPECT_EQ(cached.folder, (place / "snapshots" / "abc123").string());
  EXPECT_EQ(cached.name, "org/name");
  const std::string folder = put(tiny("llama"));
  EXPECT_EQ(find(folder, hub, Json::object()).folder, folder);
}

TEST_F(FindTest, OverridesWinAndOtherLayersMeanRandomWeights) {
  Json config = tiny("qwen3");
  config["layer_types"] = {"full_attention", "full_attention"};
  config["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 1e6}};
  const std::string folder = put(config);
  const Spec changed = find(folder, "", {{"num_hidden_layers", 5}});
  EXPECT_EQ(changed.L, 5);
  EXPECT_TRUE(changed.randomly_initialized);
  EXPECT_EQ(changed.config["num_hidden_layers"], 5);
  EXPECT_FALSE(find(folder, "", {{"num_hidden_layers", 2}}).randomly_initialized);
  EXPECT_FALSE(find(folder, "", {{"use_cache", false}}).randomly_initialized);
  EXPECT_EQ(find(folder, "", {{"rope_theta", 7.0}}).rope.theta, 7.0);
  const Spec scaled = find(folder, "", {{"rope_scaling", {{"rope_type", "linear"}, {"factor", 2.0}}}});
  EXPECT_EQ(scaled.rope.type, Rope::Type::kLinear);
  EXPECT_EQ(scaled.rope.theta, 1e6);
  EXPECT_EQ(models::find("Qwen/Qwen3-8B", "", {{"num_hidden_layers", 1}}).L, 1);
}

TEST_F(FindTest, MistakesAreNamed) {
  const std::string folder = put(tiny("llama"));
  EXPECT_NE(failure(folder, {{"rope_thta", 1.0}}).find("model.hf_config_kwargs.rope_thta"), std::string::npos);
  EXPECT_NE(failure(folder, {{"vocab_size", -1}}).find("config.json with model.hf_config_kwargs: vocab_size"), std::string::npos);
  const std::string missing = failure("org/unheard", Json::object());
  EXPECT_NE(missing.find("org/unheard/config.json"), std::string::npos) << missing;
  EXPECT_NE(missing.find((folder_ / "hub").string()), std::string::npos) << missing;
  write(folder_ / "config.json", "{");
  EXPECT_NE(failure(folder, Json::object()).find("config.json: not JSON"), std::string::npos);
}

}  // namespace
}  // namespace uly::models
