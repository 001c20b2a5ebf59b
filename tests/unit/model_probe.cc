// Prints what a folder's configuration was read as, for tests that compare it with another implementation.
//
//   model_probe FOLDER [LENGTH ...]
//   model_probe FOLDER --copy TARGET MAX_FILE_BYTES
//
// One JSON object: the dimensions and switches of the Spec, the tensors of every unit, and the rope table for each LENGTH.
// --copy reads the weights and saves them as fp32 to TARGET instead.
#include <cstdio>
#include <exception>
#include <string>

#include "base/check.h"
#include "checkpoint/hub.h"
#include "models/spec.h"

namespace uly {
namespace {

Json spec_json(const models::Spec& s) {
  return {{"family", s.family},
          {"architecture", s.architecture},
          {"D", s.D},
          {"F", s.F},
          {"N", s.N},
          {"K", s.K},
          {"H", s.H},
          {"V", s.V},
          {"L", s.L},
          {"norm_eps", s.norm_eps},
          {"initializer_range", s.initializer_range},
          {"tied_embeddings", s.tied_embeddings},
          {"qkv_bias", s.qkv_bias},
          {"o_bias", s.o_bias},
          {"mlp_bias", s.mlp_bias},
          {"qk_norm", s.qk_norm},
          {"max_positions", s.max_positions},
          {"sliding_window", s.sliding_window},
          {"padding_token", s.padding_token},
          {"num_parameters", models::num_parameters(s)}};
}

Json tensors_json(const models::Spec& spec) {
  Json all = Json::array();
  for (const models::Unit& unit : models::units(spec))
    for (const models::Tensor& tensor : unit.tensors)
      all.push_back({{"unit", unit.name}, {"name", tensor.name}, {"shape", tensor.shape}, {"offset", tensor.offset}, {"decays", tensor.decays}});
  return all;
}

int copy(const std::string& folder, const std::string& target, int64_t max_file_bytes) {
  const models::Spec spec = models::find(folder, "", Json::object());
  const checkpoint::HubReader reader(folder, spec);
  checkpoint::HubWriter writer(spec, {.folder = target, .dtype = Dtype::kF32, .tokenizer_folder = folder, .max_file_bytes = max_file_bytes});
  for (const models::Unit& unit : models::units(spec)) {
    std::vector<float> flat(static_cast<size_t>(unit.elements));
    reader.read(unit, 0, unit.elements, flat.data());
    writer.append(flat.data(), unit.elements);
  }
  writer.finish();
  return 0;
}

int probe(int argc, char** argv) {
  const models::Spec spec = models::find(argv[1], "", Json::object());
  Json out = spec_json(spec);
  out["tensors"] = tensors_json(spec);
  out["rope"] = Json::array();
  for (int i = 2; i < argc; ++i) {
    const models::RopeTable table = models::rope_table(spec, std::stoll(argv[i]));
    out["rope"].push_back({{"inverse_frequencies", table.inverse_frequencies}, {"attention_factor", table.attention_factor}});
  }
  std::printf("%s\n", out.dump().c_str());
  return 0;
}

}  // namespace
}  // namespace uly

int main(int argc, char** argv) {
  if (argc < 2) return std::fprintf(stderr, "model_probe FOLDER [LENGTH ...]\n"), 2;
  try {
    if (argc == 5 && std::string(argv[2]) == "--copy") return uly::copy(argv[1], argv[3], std::stoll(argv[4]));
    return uly::probe(argc, argv);
  } catch (const uly::Error& error) {
    return std::fprintf(stderr, "%s\n", error.what()), static_cast<int>(error.exit());
  }
}
