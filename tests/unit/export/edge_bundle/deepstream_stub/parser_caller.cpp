// Calls a parser library as nvinfer does, for tests that speak C: dlopen, dlsym, one frame.
#include <dlfcn.h>

#include <cstdint>

#include "nvdsinfer_custom_impl.h"

struct CallerLayer {
    const char* name;
    void* buffer;
    std::int32_t data_type;
    std::uint32_t num_dims;
    std::uint32_t dims[8];
};

extern "C" int object_size() { return static_cast<int>(sizeof(NvDsInferObjectDetectionInfo)); }

// Objects found, -1: no library or no function, -2: the parser refuses.
// `found` gets 7 floats an object: class, left, top, width, height, confidence, rotation.
extern "C" int call_parser(const char* library, const CallerLayer* layers, int num_layers,
                           std::uint32_t width, std::uint32_t height, std::uint32_t num_classes,
                           const float* thresholds, int num_thresholds, float* found,
                           int capacity) {
    void* handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) return -1;
    auto parse =
        reinterpret_cast<NvDsInferParseCustomFunc>(dlsym(handle, "NvDsInferParseRetinaNet"));
    if (parse == nullptr) return -1;
    std::vector<NvDsInferLayerInfo> infos;
    for (int index = 0; index < num_layers; ++index) {
        NvDsInferLayerInfo info{};
        info.dataType = static_cast<NvDsInferDataType>(layers[index].data_type);
        info.layerName = layers[index].name;
        info.buffer = layers[index].buffer;
        info.inferDims.numDims = layers[index].num_dims;
        info.inferDims.numElements = 1;
        for (std::uint32_t axis = 0; axis < layers[index].num_dims && axis < 8; ++axis) {
            info.inferDims.d[axis] = layers[index].dims[axis];
            info.inferDims.numElements *= layers[index].dims[axis];
        }
        infos.push_back(info);
    }
    NvDsInferNetworkInfo network{width, height, 3};
#ifdef REAL_HEADERS
    std::vector<float> pre(thresholds, thresholds + num_thresholds), post(pre);
    NvDsInferParseDetectionParams params{num_classes, pre, post};
#else
    NvDsInferParseDetectionParams params{
        num_classes, std::vector<float>(thresholds, thresholds + num_thresholds)};
#endif
    std::vector<NvDsInferObjectDetectionInfo> objects;
    if (!parse(infos, network, params, objects)) return objects.empty() ? -2 : -3;
    int count = 0;
    for (auto const& object : objects) {
        if (count == capacity) break;
        float* row = found + 7 * count++;
        row[0] = static_cast<float>(object.classId);
        row[1] = object.left;
        row[2] = object.top;
        row[3] = object.width;
        row[4] = object.height;
        row[5] = object.detectionConfidence;
#ifdef STUB_ROTATION
        row[6] = object.rotation_angle;
#else
        row[6] = 0.0F;
#endif
    }
    return static_cast<int>(objects.size());
}
