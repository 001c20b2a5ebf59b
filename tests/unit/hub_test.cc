#include "checkpoint/hub.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "base/check.h"
#include "checkpoint/init.h"

namespace uly::checkpoint {
namespace {

namespace fs = std::filesystem;

void write(const fs::path& path, const std::string& text) {
  fs::create_directories(path.parent_path());
  std::ofstream(path) << text;
}

std::string text_of(const fs::path& path) {
  std::ostringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

std::vector<float> initial(const models::Spec& spec, size_t index, int64_t first, int64_t count) {
  std::vector<float> values(static_cast<size_t>(count), -7.0f);
  fill_initial(spec, models::units(spec)[index], 42, static_cast<int64_t>(index), first, count, values.data());
  return values;
}

std::vector<float> initial(const models::Spec& spec, size_t index) { return initial(spec, index, 0, models::units(spec)[index].elements); }

std::vector<uint16_t> to_bf16(const std::vector<float>& values) {
  std::vector<uint16_t> out;
  for (float value : values) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    out.push_back(static_cast<uint16_t>(bits >> 16));
  }
  return out;
}

class HubTest : public testing::Test {
 protected:
  HubTest() {
    std::string name = (fs::temp_directory_path() / "hub_test.XXXXXX").string();
    folder_ = ::mkdtemp(name.data());
  }
  ~HubTest() override { fs::remove_all(folder_); }

  static models::Spec tiny(bool tied = false) {
    return models::spec_from_config({{"architectures", {"Qwen3ForCausalLM"}},
                                     {"model_type", "qwen3"},
                                     {"hidden_size", 24},
                                     {"intermediate_size", 40},
                                     {"num_hidden_layers", 3},
                                     {"num_attention_heads", 4},
                                     {"num_key_value_heads", 2},
                                     {"head_dim", 6},
                                     {"vocab_size", 11},
                                     {"tie_word_embeddings", tied},
                                     {"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 1e6}}}},
                                    "config.json");
  }

  std::string at(const std::string& name) const { return (folder_ / name).string(); }

  // Saves the model of seed 42 to `name`, in pieces of `piece` elements.
  void save(const models::Spec& spec, const std::string& name, Dtype dtype, int64_t max_file_bytes, int64_t piece, const std::string& tokenizer = "") const {
    HubWriter writer(spec, {.folder = at(name), .dtype = dtype, .tokenizer_folder = tokenizer, .max_file_bytes = max_file_bytes});
    std::vector<float> all;
    for (size_t i = 0; i < models::units(spec).size(); ++i) {
      const std::vector<float> values = initial(spec, i);
      all.insert(all.end(), values.begin(), values.end());
    }
    const std::vector<uint16_t> halves = to_bf16(all);
    for (int64_t i = 0; i < static_cast<int64_t>(all.size()); i += piece) {
      const int64_t count = std::min(piece, static_cast<int64_t>(all.size()) - i);
      writer.append(dtype == Dtype::kF32 ? static_cast<const void*>(all.data() + i) : halves.data() + i, count);
    }
    writer.finish();
  }

  // Writes weights as another program would; `change` edits the declared tensors.
  template <typename Change>
  void write_weights(const models::Spec& spec, const std::string& name, Dtype dtype, Change change) const {
    std::vector<SafetensorsWriter::Declared> declared;
    for (const models::Unit& unit : models::units(spec))
      for (const models::Tensor& tensor : unit.tensors) declared.push_back({tensor.name, dtype, tensor.shape});
    change(declared);
    fs::create_directories(folder_ / name);
    SafetensorsWriter writer(at(name + "/model.safetensors"), declared, {});
    for (const auto& tensor : declared) {
      int64_t bytes = bytes_of(tensor.dtype);
      for (int64_t size : tensor.shape) bytes *= size;
      const std::vector<char> fill(static_cast<size_t>(bytes), static_cast<char>(tensor.name.size()));
      writer.append(fill.data(), bytes);
    }
    writer.finish();
  }

  std::string read_failure(const models::Spec& spec, const std::string& name) const {
    try {
      const HubReader reader(at(name), spec);
    } catch (const UserError& error) {
      return error.what();
    }
    return "";
  }

  std::string save_failure(const models::Spec& spec, const std::string& name) const {
    try {
      const HubWriter writer(spec, {.folder = at(name)});
    } catch (const UserError& error) {
      return error.what();
    }
    return "";
  }

  fs::path folder_;
};

TEST_F(HubTest, WhatIsSavedInAnyPiecesAndFilesIsReadInAnyPieces) {
  for (const bool tied : {false, true}) {
    const models::Spec spec = tiny(tied);
    for (const int64_t limit : {int64_t{5'000'000'000}, int64_t{4000}, int64_t{1}}) {
      save(spec, "saved", Dtype::kF32, limit, 37);
      EXPECT_EQ(fs::exists(folder_ / "saved/model.safetensors"), limit > 1'000'000);
      EXPECT_FALSE(fs::exists(folder_ / "saved.incomplete"));
      const HubReader reader(at("saved"), spec);
      const std::vector<models::Unit> units = models::units(spec);
      for (size_t i = 0; i < units.size(); ++i) {
        const std::vector<float> expected = initial(spec, i);
        std::vector<float> found(expected.size(), -1.0f);
        for (int64_t first = 0; first < units[i].elements; first += 101)
          reader.read(units[i], first, std::min<int64_t>(101, units[i].elements - first), found.data() + first);
        EXPECT_EQ(found, expected) << units[i].name;
      }
    }
  }
}

TEST_F(HubTest, HalfPrecisionIsReadExactly) {
  const models::Spec spec = tiny();
  save(spec, "saved", Dtype::kBf16, 3000, 1000);
  const HubReader reader(at("saved"), spec);
  const models::Unit unit = models::units(spec)[1];
  std::vector<float> found(static_cast<size_t>(unit.elements));
  reader.read(unit, 0, unit.elements, found.data());
  EXPECT_EQ(to_bf16(found), to_bf16(initial(spec, 1)));

  write_weights(spec, "f16", Dtype::kF16, [](auto&) {});
  std::fstream file(at("f16/model.safetensors"), std::ios::in | std::ios::out | std::ios::binary);
  const uint16_t bits[] = {0x3c00, 0xc000, 0x7bff, 0x0001, 0x8000, 0x7c00, 0x0400, 0x3555};  // the embedding comes first
  uint64_t header = 0;
  file.read(reinterpret_cast<char*>(&header), 8);
  file.seekp(static_cast<std::streamoff>(8 + header)).write(reinterpret_cast<const char*>(bits), sizeof bits);
  file.close();
  std::vector<float> f16(8);
  HubReader(at("f16"), spec).read(models::units(spec)[0], 0, 8, f16.data());
  EXPECT_EQ(f16, (std::vector<float>{1, -2, 65504, 0x1p-24f, -0.0f, INFINITY, 0x1p-14f, 0.333251953125f}));
}

TEST_F(HubTest, AFingerprintIsOfBothEndsOfALargeTensorAndAllOfASmallOne) {
  Json config = tiny().config;
  config["vocab_size"] = 4096;  // an embedding of 384 KiB
  const models::Spec spec = models::spec_from_config(config, "config.json");
  write_weights(spec, "saved", Dtype::kF32, [](auto&) {});
  const auto fingerprint = [&] { return HubReader(at("saved"), spec).fingerprint(models::units(spec)); };
  const auto flip = [&](int64_t byte) {
    std::fstream file(at("saved/model.safetensors"), std::ios::in | std::ios::out | std::ios::binary);
    uint64_t header = 0;
    file.read(reinterpret_cast<char*>(&header), 8);
    const auto place = static_cast<std::streamoff>(8 + header) + byte;  // the embedding comes first
    file.seekg(place);
    const char before = static_cast<char>(file.get());
    file.seekp(place).put(static_cast<char>(before ^ 1));
  };
  const std::string before = fingerprint();
  for (const auto& [byte, seen] : {std::pair{0, true}, {393'215, true}, {393'216, true}, {60'000 - 4096, true}, {10'000, false}}) {
    flip(byte);
    EXPECT_EQ(fingerprint() != before, seen) << byte;
    flip(byte);
  }
  EXPECT_EQ(fingerprint(), before);
}

TEST_F(HubTest, TheIndexGivesTrueBytesAndEveryTensor) {
  const models::Spec spec = tiny();
  save(spec, "saved", Dtype::kBf16, 4000, 64);
  const Json index = Json::parse(text_of(folder_ / "saved/model.safetensors.index.json"));
  int64_t bytes = 0, num_files = 0;
  for (const auto& entry : fs::directory_iterator(folder_ / "saved")) {
    if (entry.path().extension() != ".safetensors") continue;
    const SafetensorsFile file(entry.path().string());
    int64_t file_bytes = 0;
    for (const auto& [name, tensor] : file.tensors()) {
      EXPECT_EQ(index["weight_map"].value(name, ""), entry.path().filename().string());
      file_bytes += tensor.bytes;
    }
    EXPECT_LE(file_bytes, 4000);
    bytes += file_bytes;
    ++num_files;
  }
  EXPECT_EQ(index["metadata"]["total_size"], bytes);
  EXPECT_EQ(bytes, 2 * models::num_parameters(spec));
  EXPECT_TRUE(fs::exists(folder_ / fmt::format("saved/model-00001-of-{:05}.safetensors", num_files))) << index.dump();
}

TEST_F(HubTest, WrongWeightsAreNamedWithBothShapes) {
  const models::Spec spec = tiny();
  write_weights(spec, "swapped", Dtype::kF32, [](auto& all) {
    for (auto& tensor : all)
      if (tensor.name == "model.layers.2.mlp.up_proj.weight") std::swap(tensor.shape[0], tensor.shape[1]);
  });
  EXPECT_EQ(read_failure(spec, "swapped"), "model.layers.2.mlp.up_proj.weight: expected [40, 24], found [24, 40] in " + at("swapped/model.safetensors"));
  write_weights(spec, "missing", Dtype::kF32, [](auto& all) { all.pop_back(); });
  EXPECT_EQ(read_failure(spec, "missing"), "lm_head.weight: expected [11, 24], found no tensor of that name in " + at("missing"));
  write_weights(spec, "integers", Dtype::kI32, [](auto&) {});
  EXPECT_NE(read_failure(spec, "integers").find("expected F32, BF16 or F16, found I32"), std::string::npos);
  write_weights(spec, "more", Dtype::kF32, [](auto& all) { all.push_back({"model.layers.1.self_attn.q_proj.bias", Dtype::kF32, {24}}); });
  EXPECT_NE(read_failure(spec, "more").find("model.layers.1.self_attn.q_proj.bias: expected none"), std::string::npos);
  write_weights(spec, "buffers", Dtype::kF32, [](auto& all) { all.push_back({"model.layers.1.self_attn.rotary_emb.inv_freq", Dtype::kF32, {3}}); });
  EXPECT_EQ(read_failure(spec, "buffers"), "");
}

TEST_F(HubTest, TiedModelsMayBringTheirHead) {
  const models::Spec spec = tiny(true);
  write_weights(spec, "without", Dtype::kBf16, [](auto&) {});
  EXPECT_EQ(read_failure(spec, "without"), "");
  const auto with_head = [](auto& all) { all.push_back({"lm_head.weight", Dtype::kBf16, {11, 24}}); };
  write_weights(spec, "other", Dtype::kBf16, with_head);  // filled by the length of the name: other values
  EXPECT_NE(read_failure(spec, "other").find("lm_head.weight: expected the same values"), std::string::npos);
  write_weights(spec, "head", Dtype::kBf16, [](auto& all) { all[0].name = "lm_head.weight"; });  // in place of the embedding
  EXPECT_EQ(read_failure(spec, "head"), "");
}

TEST_F(HubTest, FoldersWithoutSafetensorsAreRefused) {
  const models::Spec spec = tiny();
  EXPECT_NE(read_failure(spec, "nothing").find("found neither"), std::string::npos);
  write(folder_ / "pickled/pytorch_model.bin", "x");
  EXPECT_NE(read_failure(spec, "pickled").find("pickled weights only"), std::string::npos);
  write(folder_ / "index/model.safetensors.index.json", R"({"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}})");
  EXPECT_NE(read_failure(spec, "index").find("names model-00001-of-00002.safetensors for lm_head.weight, which is not there"), std::string::npos);
  write(folder_ / "index/model.safetensors.index.json", R"({"weight_map": {"lm_head.weight": "../x.safetensors"}})");
  EXPECT_NE(read_failure(spec, "index").find("found '../x.safetensors'"), std::string::npos);
  write(folder_ / "index/model.safetensors.index.json", R"({"weight_map": 3})");
  EXPECT_NE(read_failure(spec, "index").find("index.json: "), std::string::npos);
}

TEST_F(HubTest, ConfigIsSpelledForBothTransformers) {
  models::Spec spec = tiny();
  save(spec, "saved", Dtype::kBf16, 1 << 20, 999);
  const Json config = Json::parse(text_of(folder_ / "saved/config.json"));
  EXPECT_EQ(config["rope_theta"], 1e6);
  EXPECT_TRUE(config["rope_scaling"].is_null());
  EXPECT_FALSE(config.contains("rope_parameters"));
  EXPECT_EQ(config["dtype"], "bfloat16");
  EXPECT_EQ(config["torch_dtype"], "bfloat16");
  EXPECT_EQ(config["architectures"], Json({"Qwen3ForCausalLM"}));
  const models::Spec again = models::find(at("saved"), "", Json::object());
  EXPECT_EQ(again.rope, spec.rope);
  EXPECT_EQ(models::num_parameters(again), models::num_parameters(spec));
}

TEST_F(HubTest, FilesBesideTheWeightsAreCopied) {
  models::Spec spec = tiny();
  spec.folder = at("source");
  write(folder_ / "source/generation_config.json", "{}");
  write(folder_ / "source/tokenizer.json", "not this one");
  for (const char* name :
       {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "vocab.json", "merges.txt", "README.md"})
    write(folder_ / "tokenizer" / name, name);
  save(spec, "saved", Dtype::kF32, 1 << 20, 999, at("tokenizer"));
  EXPECT_EQ(text_of(folder_ / "saved/generation_config.json"), "{}");
  EXPECT_EQ(text_of(folder_ / "saved/tokenizer.json"), "tokenizer.json");
  EXPECT_EQ(text_of(folder_ / "saved/chat_template.jinja"), "chat_template.jinja");
  EXPECT_EQ(text_of(folder_ / "saved/merges.txt"), "merges.txt");
  EXPECT_FALSE(fs::exists(folder_ / "saved/README.md"));
}

TEST_F(HubTest, AnEarlierSaveStaysUntilTheNextIsComplete) {
  const models::Spec spec = tiny();
  save(spec, "out/saved/", Dtype::kF32, 1 << 20, 999);
  write(folder_ / "out/saved/notes.txt", "mine");
  const std::string before = text_of(folder_ / "out/saved/model.safetensors");
  {
    HubWriter writer(spec, {.folder = at("out/saved"), .dtype = Dtype::kBf16});
    const std::vector<uint16_t> some(100);
    writer.append(some.data(), 100);
    EXPECT_EQ(text_of(folder_ / "out/saved/model.safetensors"), before);
  }  // not finished
  EXPECT_EQ(text_of(folder_ / "out/saved/model.safetensors"), before);
  EXPECT_FALSE(fs::exists(folder_ / "out/saved.incomplete"));
  save(spec, "out/saved", Dtype::kBf16, 2000, 999);
  EXPECT_FALSE(fs::exists(folder_ / "out/saved/model.safetensors"));
  EXPECT_TRUE(fs::exists(folder_ / "out/saved/model.safetensors.index.json"));
  EXPECT_EQ(text_of(folder_ / "out/saved/notes.txt"), "mine");
  EXPECT_EQ(std::distance(fs::directory_iterator(folder_ / "out"), {}), 1);
}

TEST_F(HubTest, FoldersThatAreNotOursStayAsTheyAre) {
  models::Spec spec = tiny();
  write(folder_ / "work/thesis.txt", "precious");
  EXPECT_NE(save_failure(spec, "work").find("expected nothing there"), std::string::npos);
  EXPECT_TRUE(fs::exists(folder_ / "work/thesis.txt"));
  write_weights(spec, "downloaded", Dtype::kF32, [](auto&) {});
  EXPECT_NE(save_failure(spec, "downloaded").find("expected nothing there"), std::string::npos);
  fs::create_directories(folder_ / "empty");
  EXPECT_EQ(save_failure(spec, "empty"), "");
  write(folder_ / "file", "");
  EXPECT_NE(save_failure(spec, "file").find("found a file"), std::string::npos);

  save(spec, "saved", Dtype::kF32, 1 << 20, 999);
  spec.folder = at("saved");
  EXPECT_NE(save_failure(spec, "saved").find("other than the one the model is read from"), std::string::npos);
  EXPECT_NE(save_failure(spec, "./saved/../saved/").find("other than"), std::string::npos);
  EXPECT_NE(save_failure(spec, ".").find("other than"), std::string::npos);  // the source lies within
  fs::create_directory_symlink(folder_ / "saved", folder_ / "link");
  EXPECT_NE(save_failure(spec, "link").find("other than"), std::string::npos);
  EXPECT_EQ(save_failure(spec, "saved/next"), "");
}

TEST_F(HubTest, ALinkedFolderIsReplacedWhereItLies) {
  const models::Spec spec = tiny();
  fs::create_directories(folder_ / "large/disk");
  fs::create_directory_symlink(folder_ / "large/disk", folder_ / "link");
  save(spec, "link", Dtype::kF32, 1 << 20, 999);
  EXPECT_TRUE(fs::is_symlink(folder_ / "link"));
  EXPECT_TRUE(fs::exists(folder_ / "large/disk/model.safetensors"));
}

TEST_F(HubTest, TooLittleRoomIsSaidBeforeAnythingIsWritten) {
  models::Spec spec = tiny();
  spec.V = int64_t{1} << 45;
  const std::string text = save_failure(spec, "huge");
  EXPECT_EQ(text.rfind(at("huge") + ": no room on disk: needs 3.0 PiB", 0), 0u) << text;
  EXPECT_FALSE(fs::exists(folder_ / "huge.incomplete"));
}

TEST(InitTest, ValuesDependOnSeedAndElementOnly) {
  models::Spec spec = models::spec_from_config({{"model_type", "llama"},
                                                {"hidden_size", 64},
                                                {"intermediate_size", 96},
                                                {"num_hidden_layers", 2},
                                                {"num_attention_heads", 4},
                                                {"num_key_value_heads", 2},
                                                {"vocab_size", 500},
                                                {"attention_bias", true},
                                                {"initializer_range", 0.05},
                                                {"pad_token_id", 3}},
                                               "");
  const std::vector<models::Unit> units = models::units(spec);
  for (size_t i = 0; i < units.size(); ++i) {
    const std::vector<float> whole = initial(spec, i);
    for (int64_t first = 0; first < units[i].elements; first += 333) {
      const int64_t count = std::min<int64_t>(333, units[i].elements - first);
      EXPECT_EQ(initial(spec, i, first, count), std::vector<float>(whole.begin() + first, whole.begin() + first + count));
    }
    std::vector<bool> covered(whole.size());
    for (const models::Tensor& tensor : units[i].tensors)
      for (int64_t j = tensor.offset; j < tensor.offset + tensor.elements(); ++j) {
        covered[static_cast<size_t>(j)] = true;
        const float value = whole[static_cast<size_t>(j)];
        EXPECT_TRUE(!tensor.is_norm || value == 1.0f);
        EXPECT_TRUE(!tensor.is_bias || value == 0.0f);
      }
    for (size_t j = 0; j < whole.size(); ++j) EXPECT_TRUE(covered[j] || whole[j] == 0.0f);
  }
  EXPECT_NE(initial(spec, 1), initial(spec, 2));
  const std::vector<float> embedding = initial(spec, 0);
  for (size_t j = 3 * 64; j < 4 * 64; ++j) EXPECT_EQ(embedding[j], 0.0f);
  double sum = 0, square = 0, fourth = 0;
  for (float value : embedding) {
    sum += value;
    square += double{value} * value;
    fourth += std::pow(double{value}, 4);
  }
  const double n = 499 * 64;
  EXPECT_NEAR(sum / n, 0, 4 * 0.05 / std::sqrt(n));
  EXPECT_NEAR(std::sqrt(square / n), 0.05, 0.001);
  EXPECT_NEAR(fourth / n / std::pow(square / n, 2), 3.0, 0.15);  // the kurtosis of a normal distribution
}

}  // namespace
}  // namespace uly::checkpoint
