// A YAML 1.1 document as a tree that remembers its lines.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/json.h"

namespace uly::recipe {

struct Node;
using NodePtr = std::shared_ptr<const Node>;

struct Entry {
  std::string key;
  int line = 0;
  NodePtr value;
};

struct Node {
  enum class Kind { kScalar, kList, kMapping };
  Kind kind = Kind::kScalar;
  int line = 0;      // from 1; 0: it stands on the command line
  std::string text;  // of a scalar, as written
  Json scalar;       // what it means: null, boolean, integer, number, string
  std::vector<NodePtr> items;
  std::vector<Entry> entries;  // keys are unique, merge keys resolved
  int64_t weight = 1;          // values in this tree, aliases expanded

  bool is_null() const { return kind == Kind::kScalar && scalar.is_null(); }
  const Entry* find(const std::string& key) const;  // nullptr if absent
};

// Reads one document. With `in_file` false all lines are 0. Throws UserError "name:line: ..." for bad YAML, a duplicate
// key, a tag that is not plain YAML, nesting beyond 64 levels, aliases that expand to more than 100,000 values.
NodePtr read_yaml(const std::string& text, const std::string& name, bool in_file);

Json to_json(const Node& node);

// Says what stands there, for messages: 'two', 2, nothing, a list, a mapping.
std::string describe(const Node& node);

}  // namespace uly::recipe
