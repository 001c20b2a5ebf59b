#include "train/save.h"

#include <filesystem>
#include <functional>

#include "base/check.h"
#include "base/safetensors.h"
#include "checkpoint/hub.h"

namespace uly::train {

void on_first(comm::World& world, const std::function<void()>& action) {
  std::string failure;
  if (world.rank() == 0) {
    try {
      action();
    } catch (const UserError& e) {
      failure = e.what();
    }
  }
  failure = world.all().exchange(failure)[0];
  if (!failure.empty()) throw UserError(failure);
}

std::string save_folder(const recipe::Checkpoint& c, int64_t step) { return (std::filesystem::path(c.output_dir) / fmt::format("global_step_{}", step)).string(); }

void save_hub(Session& s, const std::string& folder) {
  std::unique_ptr<checkpoint::HubWriter> writer;
  on_first(s.world(), [&] {
    writer = std::make_unique<checkpoint::HubWriter>(s.spec(), checkpoint::HubWriterOptions{.folder = folder, .dtype = s.recipe().model.dtype, .tokenizer_folder = s.tokenizer_folder()});
  });
  for (size_t u = 0; u < s.units().size(); ++u) {
    const std::vector<uint8_t> whole = s.gather_weights(u);
    on_first(s.world(), [&] { writer->append(whole.data(), s.units()[u].elements); });
  }
  on_first(s.world(), [&] { writer->finish(); });
}

void dump_gradients(Session& s, const std::string& folder, int64_t step, double loss) {
  std::unique_ptr<SafetensorsWriter> writer;
  on_first(s.world(), [&] {
    std::vector<SafetensorsWriter::Declared> declared;
    for (const models::Unit& unit : s.units())
      for (const models::Tensor& t : unit.tensors) declared.push_back({t.name, Dtype::kF32, t.shape});
    std::filesystem::create_directories(folder);
    writer = std::make_unique<SafetensorsWriter>(fmt::format("{}/step_{}.safetensors", folder, step), declared, std::map<std::string, std::string>{{"loss", fmt::format("{:.17g}", loss)}});
  });
  for (size_t u = 0; u < s.units().size(); ++u) {
    const std::vector<uint8_t> whole = s.gather_gradient(u);
    on_first(s.world(), [&] {
      for (const models::Tensor& t : s.units()[u].tensors) writer->append(whole.data() + t.offset * 4, t.elements() * 4);
    });
  }
  on_first(s.world(), [&] { writer->finish(); });
}

}  // namespace uly::train
