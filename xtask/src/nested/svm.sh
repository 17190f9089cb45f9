
# A host with SVM: this machine's files come by 9p. Runs /job/command, and reports "exit STATUS",
# or "no-files REASON".
share() {
    mkdir -p "$2"
    mount -t 9p -o "trans=virtio,version=9p2000.L,msize=512000,cache=loose,$3" "$1" "$2" ||
        echo "no-files $1" >&3
}
# Writable, and forgotten at the end.
share machine /lower ro
mkdir /upper
mount -t tmpfs tmpfs /upper
mkdir /upper/files /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work machine /machine ||
    echo "no-files overlay" >&3
for folder in tmp run var/tmp; do
    mount -t tmpfs -o mode=1777 tmpfs /machine/$folder
done
workspace=/machine$(cat /job/workspace)
# One of those folders may have hidden it.
[ -e "$workspace" ] || share workspace "$workspace" ro
share target "$workspace/target" rw
for folder in proc sys dev; do
    mount --rbind /$folder /machine/$folder
done
mkdir /machine/run/job
cp /job/* /machine/run/job/

run chroot /machine /bin/sh /run/job/command
echo "exit $status" >&3
sync
exec poweroff -f
