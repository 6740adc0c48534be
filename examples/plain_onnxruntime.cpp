// Run a bundle's model in C++ with plain onnxruntime. The one input and the outputs are float32.
//
//   g++ -std=c++17 -O2 -I HEADERS plain_onnxruntime.cpp LIBRARY -Wl,-rpath,FOLDER_OF_LIBRARY -o plain_onnxruntime
//   ./plain_onnxruntime BUNDLE < input.f32 > output.f32
//
// HEADERS holds onnxruntime_cxx_api.h: Debian 13's libonnxruntime-dev puts it into /usr/include/onnxruntime, the release
// archives of onnxruntime into include. LIBRARY is libonnxruntime.so.1 of the same release or a later one; the one in the
// Python package (onnxruntime/capi/libonnxruntime.so.1.*) will do, under the name libonnxruntime.so.1.
// stdin: the values of any number of samples; stdout: the values of all outputs in their order.

#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

// The line `threads = 4` of session.toml; 0, onnxruntime's word for all cores, where there is none.
int threads_of(const std::string& bundle) {
  std::ifstream file(bundle + "/session.toml");
  if (!file) throw std::runtime_error(bundle + " is no bundle: it has no session.toml");
  const std::string key = "threads = ";
  for (std::string line; std::getline(file, line);)
    if (line.rfind(key, 0) == 0) return std::stoi(line.substr(key.size()));
  return 0;
}

std::vector<float> read_floats(std::istream& stream) {
  const std::string bytes{std::istreambuf_iterator<char>(stream), {}};
  const auto* first = reinterpret_cast<const float*>(bytes.data());
  return {first, first + bytes.size() / sizeof(float)};
}

void run(const std::string& bundle) {
  Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "plain");
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(threads_of(bundle));
  Ort::Session session(env, (bundle + "/model.onnx").c_str(), options);

  Ort::AllocatorWithDefaultOptions allocator;
  std::vector<int64_t> shape = session.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();
  for (size_t axis = 1; axis < shape.size(); ++axis)
    if (shape[axis] < 0) throw std::runtime_error("an axis besides the first is not fixed: give it a size here");
  std::vector<float> values = read_floats(std::cin);
  const int64_t sample = std::accumulate(shape.begin() + 1, shape.end(), int64_t{1}, std::multiplies<>());
  shape[0] = static_cast<int64_t>(values.size()) / sample;
  if (shape[0] == 0 || shape[0] * sample != static_cast<int64_t>(values.size()))
    throw std::runtime_error("expected a multiple of " + std::to_string(sample) + " float32 values on stdin");

  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const auto input = Ort::Value::CreateTensor<float>(memory, values.data(), values.size(), shape.data(), shape.size());
  std::vector<Ort::AllocatedStringPtr> names;
  const auto keep = [&names](Ort::AllocatedStringPtr name) { return names.emplace_back(std::move(name)).get(); };
  const std::vector<const char*> inputs{keep(session.GetInputNameAllocated(0, allocator))};
  std::vector<const char*> outputs;
  for (size_t number = 0; number < session.GetOutputCount(); ++number)
    outputs.push_back(keep(session.GetOutputNameAllocated(number, allocator)));

  for (auto& output : session.Run(Ort::RunOptions{nullptr}, inputs.data(), &input, 1, outputs.data(), outputs.size()))
    std::fwrite(output.GetTensorData<float>(), sizeof(float), output.GetTensorTypeAndShapeInfo().GetElementCount(), stdout);
}

int main(int count, char** arguments) {
  if (count != 2) {
    std::cerr << "usage: plain_onnxruntime BUNDLE < input.f32 > output.f32\n";
    return EXIT_FAILURE;
  }
  try {
    run(arguments[1]);
  } catch (const std::exception& error) {  // Ort::Exception is one
    std::cerr << "error: " << error.what() << '\n';
    return EXIT_FAILURE;
  }
  return EXIT_SUCCESS;
}
